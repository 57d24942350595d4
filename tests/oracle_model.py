"""A gated model whose cache is the list oracle: attention in float64 over Python lists, one entry at a time."""

from __future__ import annotations

import numpy as np
import torch
from oracle import OracleCache
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.gated import GatedModel, chunk_positions


class OracleModel:
    """Weights from the model, everything about the cache from :class:`OracleCache`."""

    def __init__(self, model: GatedModel, config: CacheConfig) -> None:
        self.model = model
        shape = model.config
        self.rows = (shape.num_hidden_layers, shape.num_key_value_heads)
        self.cache = OracleCache(
            *self.rows,
            budget=config.budget,
            buffer=config.buffer,
            sinks=config.sinks,
            recent=config.recent,
            policy=config.policy,
            min_per_head=config.min_per_head,
            threshold=config.threshold,
            caps=config.caps,
        )
        self.seen = 0
        self._log_beta: dict[int, Tensor] = {}

    @torch.no_grad()
    def read(self, tokens: list[int]) -> np.ndarray:
        """Reads a chunk, runs the event if one is due, and returns the logits after its last token."""
        ids = torch.tensor([tokens])
        logits = self.model(ids, chunk_positions(self.seen, len(tokens)), self)
        self.seen += len(tokens)
        self.cache.end_step(self.seen)
        return logits[0, -1].numpy()

    def positions(self) -> np.ndarray:
        """Positions held, ``[layers, kv_heads, most]``, oldest first; -1 behind a head's last."""
        held = {where: self.cache.positions(*where) for where in np.ndindex(self.rows)}
        table = np.full((*self.rows, max(map(len, held.values()))), -1)
        for where, positions in held.items():
            table[where][: len(positions)] = positions
        return table

    def retain(self, layer: int, log_beta: Tensor) -> None:
        self._log_beta[layer] = log_beta[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, count = query.shape[1], query.shape[2]
        group = heads // key.shape[1]
        out = torch.zeros(1, count, heads, query.shape[3])
        q, k, v = (x[0].double().numpy() for x in (query, key, value))
        for t in range(count):
            for head in range(key.shape[1]):
                log_beta = float(self._log_beta[layer][t, head])
                self.cache.append(layer, head, self.seen + t, log_beta, k[head, t], v[head, t])
                entries = self.cache.entries(layer, head)
                keys, values = (np.stack([getattr(entry, name) for entry in entries]) for name in ("key", "value"))
                for g in range(head * group, (head + 1) * group):
                    logits = keys @ q[g, t] * scale
                    weights = np.exp(logits - logits.max())
                    out[0, t, g] = torch.from_numpy(weights @ values / weights.sum())
        return out
