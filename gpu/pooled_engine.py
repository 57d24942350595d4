"""The torch engine where heads share a budget: one stream over its pool, its steps compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.gpu.compiled import Steps
from trimkv_edge.gpu.engine import OnDevice
from trimkv_edge.gpu.placement import home
from trimkv_edge.gpu.pool import DevicePool, PooledAttention
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.pool import PooledCache
from trimkv_edge.pooled_engine import PooledEngine


class DevicePooledEngine(OnDevice, PooledEngine):
    """A budget that heads share. Subclasses call :meth:`_open`, or :meth:`_join` a batch that is there."""

    def _open(self, model: GatedModel, compiled: bool) -> None:
        """A batch of one. ``model``: on its device, in its type."""
        device, dtype = home(model)
        shape = (self.num_layers, self.num_kv_heads, self.head_dim)
        pool = DevicePool(self.config, *shape, dtype=dtype, device=device)
        self._join(pooled_steps(model, pool, compiled), pool, 0)

    def _join(self, graphs: Steps, pool: DevicePool, row: int) -> None:
        self._run_on(graphs, row)
        self.pool = pool

    @property
    def _cache(self) -> PooledCache:
        return self.pool.caches[self._row]

    def _place(self, seen: int, live: int) -> None:
        self._cache.seen, self._cache.fill = seen, live
        self.pool.sync(self._row)

    def _counted(self, seen: int, live: int) -> None:
        super()._counted(seen, live)
        self._cache.seen, self._cache.fill = seen, live

    @torch.no_grad()
    def _evict(self, seen: int) -> None:
        self._go_to(seen, self.live)
        self._cache.evict()
        self.pool.sync(self._row)
        self._at = (seen, 0)

    def _reset(self) -> None:
        self._cache.reset()
        self.pool.sync(self._row)
        self._at = (0, 0)

    def _lengths(self) -> IntArray:
        return np.asarray(self._cache.kept[0].cpu().numpy()).copy()

    def _table(self, pool: Tensor, width: int) -> Tensor:
        """Each head's first ``width`` slots, ``[layers, kv_heads, width, ...]``, on the host."""
        return pool[self.pool.places(self._row, width)].cpu()

    def _kept_positions(self) -> IntArray:
        return np.asarray(self._table(self.pool.positions, int(self.kept.max())).numpy())

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        width, pool = int(self.kept.max()) + self.live, self.pool
        key, value, log_beta = (
            np.asarray(self._table(table, width).float().numpy()) for table in (pool.key, pool.value, pool.log_beta)
        )
        return key, value, log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        pool, width = self.pool, key.shape[2]
        self._cache.place(torch.from_numpy(self.kept).to(pool.start.device).unsqueeze(0), seen, live)
        inside = torch.from_numpy(np.arange(width) < self.kept[..., None] + live).to(pool.start.device)
        places = pool.places(self._row, width)[inside]
        tables = ((pool.key, key), (pool.value, value), (pool.log_beta, log_beta), (pool.positions, kept))
        for table, rows in tables:
            table[places] = torch.from_numpy(np.ascontiguousarray(rows)).to(table)[inside]
        pool.sync(self._row)
        self._at = (seen, live)


class CompiledPooledEngine(DevicePooledEngine):
    """The torch engine over a gated model whose heads share a budget; arguments and errors as for
    :class:`~trimkv_edge.gpu.engine.CompiledEngine`."""

    def __init__(
        self, model: GatedModel, config: CacheConfig, position_limit: int = POSITION_LIMIT, *, compiled: bool = True
    ) -> None:
        super().__init__(config, position_limit=position_limit, **model.sizes)
        self._open(model, compiled)


def pooled_steps(model: GatedModel, pool: DevicePool, compiled: bool) -> Steps:
    """The graphs of a model over the streams of a pool; an event is the core's own, for a stream at a time."""
    return Steps(
        model.eval(),
        lambda count, length: PooledAttention(pool, count, length),
        len(pool.caches),
        pool.config.prefill_chunk,
        compiled,
    )
