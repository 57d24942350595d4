"""The torch engine: one stream over the batched cache, its steps compiled, as the engine protocol wants it."""

from __future__ import annotations

import numpy as np
import torch

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.compiled import Graphs
from trimkv_edge.gpu.placement import home
from trimkv_edge.models.gated import GatedModel


class DeviceEngine(Engine):
    """An engine over one stream of a batch. Subclasses call :meth:`_open`, or :meth:`_join` a batch that is there.

    Lengths live on the device and are counted there; a step waits for it only to hand out the logits.
    """

    name = "torch"

    def _open(self, model: GatedModel, compiled: bool) -> None:
        """A batch of one. ``model``: on its device, in its type."""
        device, dtype = home(model)
        shape = (self.num_layers, self.num_kv_heads, self.head_dim)
        cache = BatchedCache(self.config, *shape, dtype=dtype, device=device)
        self._join(Graphs(model.eval(), cache, compiled), 0)

    def _join(self, graphs: Graphs, row: int) -> None:
        self.graphs, self.cache, self._row = graphs, graphs.cache, row
        # Lengths on the device, as far as they are known here.
        self._at: tuple[int, int] | None = (0, 0)

    def warm_up(self) -> None:
        """Compiles all graphs now, and records CUDA graphs; needs a free slot. The stream stays as it is."""
        self.graphs.warm_up()

    def _go_to(self, seen: int, live: int) -> None:
        """Lengths on the device as the caller counts them: they differ only after a step that failed."""
        if self._at != (seen, live):
            self.cache.place(seen, live, self._row)
        self._at = None

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        graphs, count = self.graphs, int(ids.size)
        self._go_to(position, live)
        graphs.count.zero_()
        graphs.count[self._row] = count
        if count == 1:
            graphs.token[self._row] = int(ids[0])
            graphs.decode()
        else:
            graphs.chunk[self._row, -count:] = torch.from_numpy(ids).to(graphs.chunk)
            graphs.prefill()
        self._at = (position + count, live + count)
        return np.asarray(graphs.logits[self._row].cpu().numpy()).copy()

    def _evict(self, seen: int) -> None:
        self._go_to(seen, self.config.slots)
        self.graphs.due.zero_()
        self.graphs.due[self._row] = True
        self.graphs.evict()
        self._at = (seen, self.config.budget)

    def _reset(self) -> None:
        self.cache.reset(self._row)
        self._at = (0, 0)

    def _kept_positions(self) -> IntArray:
        return self.cache.kept(self._row)

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return self.cache.read(self._row)

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self.cache.write(self._row, key, value, log_beta, kept, seen, live)
        self._at = (seen, live)


class CompiledEngine(DeviceEngine):
    """The torch engine over a gated model.

    Args:
        model: on the device to run on, see :func:`~trimkv_edge.gpu.placement.moved`.
        config: the cache's settings.
        position_limit: first position that is refused.
        compiled: through ``torch.compile``: one graph for a token, one for a chunk and one for the event, the first
            and the last replayed as CUDA graphs on CUDA. False: step by step.

    Raises:
        ConfigError: settings that the engine cannot honour.
    """

    def __init__(
        self, model: GatedModel, config: CacheConfig, position_limit: int = POSITION_LIMIT, *, compiled: bool = True
    ) -> None:
        super().__init__(config, position_limit=position_limit, **model.sizes)
        self._open(model, compiled)
