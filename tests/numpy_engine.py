"""A tiny attention model in plain numpy over a real bounded cache: an engine that needs no export."""

from __future__ import annotations

import numpy as np

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray

LAYERS, HEADS, DIM, VOCAB = 2, 2, 4, 320


class NumpyEngine(Engine):
    """Seeded weights. Tokens are computed one by one, so logits do not depend on the chunking in any bit."""

    name = "numpy"

    def __init__(
        self, config: CacheConfig, *, seed: int = 0, vocab_size: int = VOCAB, position_limit: int = POSITION_LIMIT
    ) -> None:
        super().__init__(
            config,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            vocab_size=vocab_size,
            position_limit=position_limit,
        )
        random = np.random.default_rng(seed)
        width = HEADS * DIM
        self._embed = random.normal(size=(vocab_size, width))
        self._projections = random.normal(size=(LAYERS, 4, width, width)) * width**-0.5
        self._gates = random.normal(size=(LAYERS, width, HEADS))
        rows = (LAYERS, HEADS, config.slots)
        self._key, self._value = np.zeros((*rows, DIM), np.float32), np.zeros((*rows, DIM), np.float32)
        self._log_beta = np.zeros(rows, np.float32)
        self._positions = np.zeros(rows, np.int64)
        self._reset()

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        logits = np.zeros(0, np.float32)
        for offset, token in enumerate(ids):
            logits = self._token(int(token), position + offset, live + offset)
        return logits

    def _token(self, token: int, position: int, slot: int) -> FloatArray:
        hidden = self._embed[token] + 0.1 * np.sin(position / 10.0 ** np.arange(HEADS * DIM))
        for layer in range(LAYERS):
            query, key, value, out = self._projections[layer]
            self._key[layer, :, slot] = (hidden @ key).reshape(HEADS, DIM)
            self._value[layer, :, slot] = (hidden @ value).reshape(HEADS, DIM)
            self._log_beta[layer, :, slot] = -np.logaddexp(0.0, -(hidden @ self._gates[layer] + 3.0))
            self._positions[layer, :, slot] = position
            scores = np.einsum("hd,hsd->hs", (hidden @ query).reshape(HEADS, DIM), self._key[layer, :, : slot + 1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            hidden = hidden + np.einsum("hs,hsd->hd", weights, self._value[layer, :, : slot + 1]).reshape(-1) @ out
        return np.asarray(self._embed @ hidden, np.float32)

    def _evict(self, seen: int) -> None:
        budget = self.config.budget
        for row in np.ndindex(LAYERS, HEADS):
            scores = self._log_beta[row] * (seen + 1 - self._positions[row]).astype(np.float32)
            ranked = sorted(range(scores.size), key=lambda slot: (scores[slot], self._positions[row][slot]))
            leaving = set(ranked[: scores.size - budget])
            holes = sorted(slot for slot in leaving if slot < budget)
            movers = [slot for slot in range(budget, scores.size) if slot not in leaving]
            for table in (self._key, self._value, self._log_beta, self._positions):
                table[row][holes] = table[row][movers]

    def _reset(self) -> None:
        self._positions[:] = np.arange(self.config.slots)

    def _kept_positions(self) -> IntArray:
        return self._positions[..., : self.config.budget].copy()

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return self._key, self._value, self._log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self._key[:, :, :live], self._value[:, :, :live], self._log_beta[:, :, :live] = key, value, log_beta
        budget = self.config.budget
        self._positions[..., :budget] = kept
        if live > budget:
            self._positions[..., budget:live] = np.arange(seen - live + budget, seen)
