"""The eager torch engine: the reference that every exported artefact is verified against."""

from __future__ import annotations

import numpy as np
import torch

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.models.gated import GatedModel, chunk_positions
from trimkv_edge.policies.base import MASS, WINDOW


class EagerEngine(Engine):
    """Runs a :class:`GatedModel` over the torch :class:`StaticCache`, batch 1, float32 state."""

    name = "eager"

    def __init__(self, model: GatedModel, config: CacheConfig, position_limit: int = POSITION_LIMIT) -> None:
        shape = model.config
        super().__init__(
            config,
            num_layers=shape.num_hidden_layers,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=model.head_dim,
            vocab_size=shape.vocab_size,
            position_limit=position_limit,
        )
        self.model = model.eval()
        self.cache = StaticCache(config, self.num_layers, self.num_kv_heads, self.head_dim)

    @torch.no_grad()
    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        tokens = torch.from_numpy(ids).unsqueeze(0)
        logits = self.model(tokens, chunk_positions(position, ids.size), self.cache)
        self.cache.advance(ids.size)
        return np.asarray(logits[0, -1].float().numpy())

    @torch.no_grad()
    def _evict(self, seen: int) -> None:
        self.cache.evict()

    def _reset(self) -> None:
        self.cache.reset()

    def _kept_positions(self) -> IntArray:
        budget = self.config.budget
        kept = np.broadcast_to(np.arange(budget, dtype=np.int64), (self.num_layers, self.num_kv_heads, budget)).copy()
        filled = min(self.live, budget)
        kept[..., :filled] = self.cache.positions[0, :, :, :filled].numpy()
        return kept

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        key, value = (torch.cat(rows).float().numpy() for rows in (self.cache.key, self.cache.value))
        return key, value, self.cache.log_beta[0].numpy()

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        cache = self.cache
        if cache.policy.reads & {MASS, WINDOW}:
            raise StateError(
                f"policy {cache.policy.name} needs the attention of the past, which a saved state does not hold: "
                "read the stream again"
            )
        for layer in range(self.num_layers):
            cache.key[layer][0] = torch.from_numpy(key[layer])
            cache.value[layer][0] = torch.from_numpy(value[layer])
        cache.log_beta[0] = torch.from_numpy(log_beta)
        cache.positions[..., : kept.shape[-1]] = torch.from_numpy(kept)
        cache.positions[..., kept.shape[-1] : live] = torch.arange(seen - live, seen)[kept.shape[-1] :]
        cache.seen, cache.live = seen, live
