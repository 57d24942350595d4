"""Engines for the tests of the Engine contract: one of Python lists, and the eager torch engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from factories import gated_model
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.models.eager import EagerEngine

LAYERS, HEADS, DIM, VOCAB = 2, 2, 4, 50


class ListEngine(Engine):
    """A toy model whose rows depend on token and position; the slots of a head are a list of entries."""

    name = "list"

    def __init__(self, config: CacheConfig, position_limit: int = 2**24) -> None:
        super().__init__(
            config,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            vocab_size=VOCAB,
            position_limit=position_limit,
        )
        rng = np.random.default_rng(0)
        self.embed = rng.standard_normal((VOCAB, LAYERS, HEADS, 3, DIM)).astype(np.float32)
        self.betas = -rng.exponential(0.2, (VOCAB, LAYERS, HEADS)).astype(np.float32)
        self.head = rng.standard_normal((VOCAB, LAYERS * HEADS * DIM))
        self.oracle = self.fresh()

    def fresh(self) -> OracleCache:
        config = self.config
        return OracleCache(LAYERS, HEADS, config.budget, config.buffer, config.sinks, config.recent)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        mixed: list[float] = []
        for i, token in enumerate(ids.tolist()):
            mixed = []
            for layer, head in np.ndindex(LAYERS, HEADS):
                query, key, value = self.embed[token, layer, head]
                turned = np.roll(key, (position + i) % DIM)
                self.oracle.append(layer, head, position + i, float(self.betas[token, layer, head]), turned, value)
                mixed += self.oracle.attend(layer, head, query.tolist(), 0.5)
        return (self.head @ np.array(mixed)).astype(np.float32)

    def _evict(self, seen: int) -> None:
        assert self.oracle.end_step(seen)

    def _reset(self) -> None:
        self.oracle = self.fresh()

    def _kept_positions(self) -> IntArray:
        budget = self.config.budget
        kept = np.broadcast_to(np.arange(budget, dtype=np.int64), (LAYERS, HEADS, budget)).copy()
        for where in np.ndindex(LAYERS, HEADS):
            held = [entry.position for entry in self.oracle.heads[where]][:budget]
            kept[where][: len(held)] = held
        return kept

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        slots = self.config.slots
        key, value = (np.zeros((LAYERS, HEADS, slots, DIM), np.float32) for _ in range(2))
        log_beta = np.zeros((LAYERS, HEADS, slots), np.float32)
        for where in np.ndindex(LAYERS, HEADS):
            for slot, entry in enumerate(self.oracle.heads[where]):
                key[where][slot], value[where][slot], log_beta[where][slot] = entry.key, entry.value, entry.log_beta
        return key, value, log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self.oracle = self.fresh()
        for layer, head in np.ndindex(LAYERS, HEADS):
            for slot in range(live):
                position = int(kept[layer, head, slot]) if slot < kept.shape[-1] else seen - live + slot
                row = (layer, head, slot)
                self.oracle.append(layer, head, position, float(log_beta[row]), key[row].copy(), value[row].copy())


@pytest.fixture(params=["list", "eager"])
def make(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Makes fresh engines of one kind and model: ``make(config, position_limit=...)``."""
    config = CacheConfig(6, 4, 3)
    if request.param == "list":
        return lambda settings=config, **more: ListEngine(settings, **more)
    model = gated_model("qwen3-gqa")
    return lambda settings=config, **more: EagerEngine(model, settings, **more)
