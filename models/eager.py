"""The eager torch engine: the reference that every exported artefact is verified against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.cache import StaticCache, new_cache
from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.eviction import find_policy
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.models.gated import GatedModel, chunk_positions
from trimkv_edge.policies.base import MASS, WINDOW
from trimkv_edge.pool import PooledCache
from trimkv_edge.pooled_engine import PooledEngine


class TorchEngine(Engine):
    """Runs a :class:`GatedModel` over a bounded cache in torch, batch 1, float32 state."""

    name = "eager"
    cache: StaticCache | PooledCache

    def __init__(
        self,
        model: GatedModel,
        config: CacheConfig,
        position_limit: int = POSITION_LIMIT,
        scales: KVScales | None = None,
    ) -> None:
        super().__init__(config, position_limit=position_limit, **model.sizes)
        self.model = model.eval()
        self.cache = new_cache(config, self.num_layers, self.num_kv_heads, self.head_dim, scales=scales)

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


class EagerEngine(TorchEngine):
    """Policies with a budget for each head, over the :class:`StaticCache`."""

    cache: StaticCache

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
            cache.key[layer][0][:, :live] = torch.from_numpy(key[layer])
            cache.value[layer][0][:, :live] = torch.from_numpy(value[layer])
        cache.log_beta[0][..., :live] = torch.from_numpy(log_beta)
        cache.positions[..., : kept.shape[-1]] = torch.from_numpy(kept)
        cache.positions[..., kept.shape[-1] : live] = torch.arange(seen - live, seen)[kept.shape[-1] :]
        cache.seen, cache.live = seen, live


class EagerPooledEngine(PooledEngine, TorchEngine):
    """Policies with a shared budget, over the :class:`PooledCache`."""

    cache: PooledCache

    def _places(self, width: int) -> Tensor:
        """Places in the pool of each head's first ``width`` slots, ``[layers * kv_heads * width]``."""
        return self.cache.places(width)[0].flatten()

    def _table(self, pool: Tensor, width: int) -> FloatArray:
        rows = pool[0, self._places(width)].float()
        return rows.view(self.num_layers, self.num_kv_heads, width, *rows.shape[1:]).numpy()

    def _lengths(self) -> IntArray:
        return self.cache.kept[0].numpy().copy()

    def _kept_positions(self) -> IntArray:
        width = int(self.kept.max())
        places = self._places(width)
        return self.cache.positions[0, places].view(self.num_layers, self.num_kv_heads, width).numpy()

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        cache, width = self.cache, int(self.kept.max()) + self.live
        return self._table(cache.key, width), self._table(cache.value, width), self._table(cache.log_beta, width)

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        cache, width = self.cache, key.shape[2]
        cache.place(torch.from_numpy(self.kept).unsqueeze(0), seen, live)
        inside = torch.from_numpy(np.arange(width) < self.kept[..., None] + live).flatten()
        places = self._places(width)[inside]
        for pool, rows in ((cache.key, key), (cache.value, value), (cache.log_beta, log_beta), (cache.positions, kept)):
            pool[0, places] = torch.from_numpy(rows).flatten(0, 2)[inside].to(pool.dtype)


def eager_engine(
    model: GatedModel, config: CacheConfig, position_limit: int = POSITION_LIMIT, scales: KVScales | None = None
) -> TorchEngine:
    """The reference engine of the kind that the policy needs; ``scales`` for int8 keys and values.

    Raises:
        ConfigError: settings that the policy cannot honour.
    """
    kind = EagerPooledEngine if find_policy(config.policy).pooled else EagerEngine
    return kind(model, config, position_limit, scales)
