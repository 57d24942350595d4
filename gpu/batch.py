"""Several streams in one batch, each at its own length: prompts of any length, then many tokens between two waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import IntArray
from trimkv_edge.errors import PositionLimitError, StateError
from trimkv_edge.eviction import policy_of
from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.compiled import Graphs, Steps
from trimkv_edge.gpu.engine import DeviceEngine
from trimkv_edge.gpu.placement import home
from trimkv_edge.gpu.pool import DevicePool
from trimkv_edge.gpu.pooled_engine import DevicePooledEngine, pooled_steps
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.sampling import SamplingParams


class Stream(DeviceEngine):
    """One stream of a batch as an engine: for its state and survivors, or to drive it alone.

    When it is driven alone, events of other streams that are due run too: nothing can happen to a full stream before.
    """

    def __init__(self, batch: Batch, graphs: Graphs, row: int, position_limit: int) -> None:
        super().__init__(batch.config, position_limit=position_limit, **graphs.model.sizes)
        self._join(graphs, row)
        self._before = batch.evict

    def evicted(self) -> None:
        """Counts an event that the whole batch's event has run."""
        self.live = self.config.budget
        self._counted(self.seen, self.live)


class PooledStream(DevicePooledEngine):
    """The same where heads share a budget; each stream has a pool of its own."""

    def __init__(self, batch: Batch, graphs: Steps, pool: DevicePool, row: int, position_limit: int) -> None:
        super().__init__(batch.config, position_limit=position_limit, **graphs.model.sizes)
        self._join(graphs, pool, row)
        self._before = batch.evict


class Drawn:
    """Tokens that are on their way from the device."""

    def __init__(self, tokens: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._host = tokens
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tokens(self) -> IntArray:
        """Waits for them: int64 ``[streams, steps]``."""
        if self._done is not None:
            self._done.synchronize()
        return np.asarray(self._host.numpy()).copy()


class Batch:
    """A model over several streams.

    Args:
        model: on the device to run on, see :func:`~trimkv_edge.gpu.placement.moved`.
        config: the cache's settings, alike for all streams.
        size: streams.
        position_limit: first position that is refused.
        compiled: as for :class:`~trimkv_edge.gpu.engine.CompiledEngine`.

    Attributes:
        streams: an engine for each. Between calls of the batch each may be driven alone, or be given another's state.

    Raises:
        ConfigError: settings that the engine cannot honour.
    """

    def __init__(
        self,
        model: GatedModel,
        config: CacheConfig,
        size: int,
        position_limit: int = POSITION_LIMIT,
        *,
        compiled: bool = True,
    ) -> None:
        self.config = config
        self.device, dtype = home(model)
        shape = model.config
        sizes = (shape.num_hidden_layers, shape.num_key_value_heads, model.head_dim, size, dtype, self.device)
        self.graphs: Steps
        self.streams: Sequence[Stream | PooledStream]
        if policy_of(config).pooled:
            pool = DevicePool(config, *sizes)
            self.graphs = steps = pooled_steps(model, pool, compiled)
            self.streams = [PooledStream(self, steps, pool, row, position_limit) for row in range(size)]
        else:
            self.graphs = graphs = Graphs(model.eval(), BatchedCache(config, *sizes), compiled)
            self.streams = [Stream(self, graphs, row, position_limit) for row in range(size)]

    def read(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Reads tokens into the streams named, a chunk of each at a time; ``graphs.logits`` then has what follows.

        Raises:
            StateError: no such stream, an empty prompt or a token outside the vocabulary; nothing was read.
            PositionLimitError: a stream would pass its last position; nothing was read.
        """
        left = {row: self._checked(row, tokens) for row, tokens in prompts.items()}
        chunk, size = self.config.prefill_chunk, len(self.streams)
        while left:
            self.evict()
            tokens, count = np.zeros((size, chunk), np.int64), np.zeros(size, np.int64)
            for row, ids in list(left.items()):
                part = min(chunk, self.streams[row].room, ids.size)
                tokens[row, chunk - part :], count[row] = ids[:part], part
                left[row] = ids[part:]
                if not left[row].size:
                    del left[row]
            self.graphs.chunk.copy_(torch.from_numpy(tokens))
            self._step(count, self.graphs.prefill)

    def decode(self, steps: int, sampler: DeviceSampler | None = None, rows: Iterable[int] | None = None) -> Drawn:
        """Draws and reads ``steps`` tokens in each stream without waiting for the device.

        A stream goes on past a token that ends a text: what it read after that belongs to it until it is reset
        (``streams[row].reset()``).

        Args:
            sampler: default: the best token.
            rows: streams that go on; default: all that have read something. Others' columns mean nothing.

        Returns:
            the tokens drawn, ``[streams, steps]``; the device may still be at work.

        Raises:
            StateError: no such stream, or one that has read nothing yet; steps below 1.
            PositionLimitError: a stream would pass its last position; nothing was read.
        """
        if steps < 1:
            raise StateError(f"{steps} steps asked for, but a call takes at least 1")
        chosen = [row for row, stream in enumerate(self.streams) if stream.seen] if rows is None else list(rows)
        for row in chosen:
            if not 0 <= row < len(self.streams) or not self.streams[row].seen:
                raise StateError(f"stream {row} has read nothing yet: read a prompt first")
            self._check_limit(row, steps)
        if not chosen:
            raise StateError("no stream has read anything yet: read a prompt first")
        draw = sampler or DeviceSampler(SamplingParams(), self.device)
        count = np.zeros(len(self.streams), np.int64)
        count[chosen] = 1
        drawn = torch.empty(len(self.streams), steps, dtype=torch.int64, device=self.device)
        for step in range(steps):
            self.evict()
            drawn[:, step] = draw(self.graphs.logits)
            self.graphs.token.copy_(drawn[:, step : step + 1])
            self._step(count, self.graphs.decode, fresh=step == 0)
        return Drawn(drawn)

    def evict(self) -> None:
        """The events of all streams that are due; nothing if none is.

        One launch for all, and none waits for the device; where heads share a budget, one for each stream that waits.
        """
        due = [stream for stream in self.streams if stream.room == 0]
        for stream in self.streams:
            stream.settle()
        if due and isinstance(self.graphs, Graphs):
            torch.eq(self.graphs.cache.live, self.config.slots, out=self.graphs.due)
            self.graphs.evict()
        for stream in due:
            if isinstance(stream, Stream):
                stream.evicted()
            else:
                stream.evict()

    def _step(self, count: IntArray, run: Callable[[], None], fresh: bool = True) -> None:
        if fresh:
            self.graphs.count.copy_(torch.from_numpy(count))
        for stream in self.streams:
            stream.begin()
        run()
        for stream, read in zip(self.streams, count.tolist(), strict=True):
            stream.moved_on(read)

    def _checked(self, row: int, tokens: Sequence[int]) -> IntArray:
        if not 0 <= row < len(self.streams):
            raise StateError(f"stream {row} is not one of 0 to {len(self.streams) - 1}")
        ids, vocab = np.asarray(tokens), self.streams[row].vocab_size
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise StateError(f"the prompt of stream {row} has no tokens: give a list of integers")
        if ids.min() < 0 or ids.max() >= vocab:
            raise StateError(f"the prompt of stream {row} has a token outside the vocabulary of {vocab}")
        self._check_limit(row, ids.size)
        return ids.astype(np.int64)

    def _check_limit(self, row: int, count: int) -> None:
        stream = self.streams[row]
        if stream.seen + count > stream.position_limit:
            raise PositionLimitError(
                f"stream {row} would pass the last position that this model computes rightly "
                f"({stream.position_limit - 1}): start a new stream (reset)"
            )
