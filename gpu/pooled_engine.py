"""The torch engine where heads share a budget: one stream over the pool, its steps compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.gpu.compiled import Steps
from trimkv_edge.gpu.placement import home
from trimkv_edge.gpu.pool import DevicePool, PooledAttention
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.pooled_engine import PooledEngine


class DevicePooledEngine(PooledEngine):
    """As :class:`~trimkv_edge.gpu.engine.DeviceEngine`, over a pool."""

    name = "torch"

    def _open(self, model: GatedModel, compiled: bool) -> None:
        """``model``: on its device, in its type."""
        device, dtype = home(model)
        shape = (self.num_layers, self.num_kv_heads, self.head_dim)
        self.pool = pool = DevicePool(self.config, *shape, dtype=dtype, device=device)
        self.graphs = Steps(
            model.eval(),
            lambda count, length: PooledAttention(pool, count, length),
            1,
            self.config.prefill_chunk,
            compiled,
        )
        self._at: tuple[int, int] | None = (0, 0)

    def warm_up(self) -> None:
        """Compiles all graphs now, and records CUDA graphs; needs a free slot. The stream stays as it is."""
        self.graphs.warm_up()

    def _go_to(self, seen: int, fill: int) -> None:
        """Lengths on the device as the caller counts them: they differ only after a step that failed."""
        if self._at != (seen, fill):
            self.pool.cache.seen, self.pool.cache.fill = seen, fill
            self.pool.sync()
        self._at = None

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        graphs, cache, count = self.graphs, self.pool.cache, int(ids.size)
        self._go_to(position, live)
        graphs.count.fill_(count)
        if count == 1:
            graphs.token.fill_(int(ids[0]))
            graphs.decode()
        else:
            graphs.chunk[0, -count:] = torch.from_numpy(ids).to(graphs.chunk)
            graphs.prefill()
        cache.seen, cache.fill = position + count, live + count
        self._at = (cache.seen, cache.fill)
        return np.asarray(graphs.logits[0].cpu().numpy()).copy()

    @torch.no_grad()
    def _evict(self, seen: int) -> None:
        self._go_to(seen, self.live)
        self.pool.cache.evict()
        self.pool.sync()
        self._at = (seen, 0)

    def _reset(self) -> None:
        self.pool.cache.reset()
        self.pool.sync()
        self._at = (0, 0)

    def _lengths(self) -> IntArray:
        return np.asarray(self.pool.cache.kept[0].cpu().numpy()).copy()

    def _table(self, pool: Tensor, width: int) -> Tensor:
        """Each head's first ``width`` slots, ``[layers, kv_heads, width, ...]``, on the host."""
        return pool[self.pool.cache.places(width)[0]].cpu()

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
        pool.cache.place(torch.from_numpy(self.kept).to(pool.start.device).unsqueeze(0), seen, live)
        inside = torch.from_numpy(np.arange(width) < self.kept[..., None] + live).to(pool.start.device)
        places = pool.cache.places(width)[0][inside]
        tables = ((pool.key, key), (pool.value, value), (pool.log_beta, log_beta), (pool.positions, kept))
        for table, rows in tables:
            table[places] = torch.from_numpy(np.ascontiguousarray(rows)).to(table)[inside]
        pool.sync()
        self._at = (seen, live)


class CompiledPooledEngine(DevicePooledEngine):
    """The torch engine over a gated model whose heads share a budget; arguments and errors as for
    :class:`~trimkv_edge.gpu.engine.CompiledEngine`."""

    def __init__(
        self, model: GatedModel, config: CacheConfig, position_limit: int = POSITION_LIMIT, *, compiled: bool = True
    ) -> None:
        super().__init__(config, position_limit=position_limit, **model.sizes)
        self._open(model, compiled)
