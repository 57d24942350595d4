"""The torch engine: one stream over the batched cache, its steps compiled, as the engine protocol wants it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.compiled import Graphs, Steps
from trimkv_edge.gpu.placement import home
from trimkv_edge.models.gated import GatedModel


class OnDevice(Engine):
    """An engine over stream ``row`` of a batch on a device.

    Lengths live on the device and are counted there; a step waits for it only to hand out the logits.
    """

    name = "torch"
    # What has to be done for the other streams before a step of this one.
    _before: Callable[[], None] | None = None

    def _run_on(self, graphs: Steps, row: int) -> None:
        self.graphs, self._row = graphs, row
        # Lengths on the device, as far as they are known here.
        self._at: tuple[int, int] | None = (0, 0)

    def warm_up(self) -> None:
        """Compiles all graphs now, and records CUDA graphs; needs a free slot. The stream stays as it is."""
        self.graphs.warm_up()

    def settle(self) -> None:
        """Lengths on the device as they are counted here: they differ only after a step that failed."""
        at = (self.seen, self.live)
        self._go_to(*at)
        self._at = at

    def begin(self) -> None:
        """A step begins, after which the lengths on the device are known only if it ends."""
        self._at = None

    def moved_on(self, count: int) -> None:
        """Counts tokens that a step of the whole batch has read."""
        self.seen, self.live = self.seen + count, self.live + count
        self._counted(self.seen, self.live)

    def _go_to(self, seen: int, live: int) -> None:
        if self._at != (seen, live):
            self._place(seen, live)
        self._at = None

    def _counted(self, seen: int, live: int) -> None:
        """The device has come to these lengths."""
        self._at = (seen, live)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        if self._before:
            self._before()
        self._go_to(position, live)
        logits = self.graphs.run(self._row, ids)
        self._counted(position + ids.size, live + ids.size)
        return logits

    @abstractmethod
    def _place(self, seen: int, live: int) -> None:
        """Sets the lengths on the device."""


class DeviceEngine(OnDevice):
    """A budget for each head. Subclasses call :meth:`_open`, or :meth:`_join` a batch that is there."""

    graphs: Graphs

    def _open(self, model: GatedModel, compiled: bool) -> None:
        """A batch of one. ``model``: on its device, in its type."""
        device, dtype = home(model)
        shape = (self.num_layers, self.num_kv_heads, self.head_dim)
        cache = BatchedCache(self.config, *shape, dtype=dtype, device=device)
        self._join(Graphs(model.eval(), cache, compiled), 0)

    def _join(self, graphs: Graphs, row: int) -> None:
        self._run_on(graphs, row)
        self.cache = graphs.cache

    def _place(self, seen: int, live: int) -> None:
        self.cache.place(seen, live, self._row)

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
