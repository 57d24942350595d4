"""What every engine does (numpy only): the contract between a bounded cache and whoever drives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.errors import PositionLimitError, StateError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """How far a stream with pictures was read.

    Attributes:
        position: M-RoPE position of the next text token; inside a picture, of its corner.
        row: rows of the present picture that were read, 0 outside pictures.
        ended: kind of the picture that the stream ends with, empty if it ends with text.
    """

    position: int = 0
    row: int = 0
    ended: str = ""


@dataclass(frozen=True)
class CacheState:
    """Live entries of a cache, in slot order; the same in every engine.

    Attributes:
        seen: tokens of the stream read so far.
        key, value: float32 ``[layers, kv_heads, live, head_dim]``; keys after RoPE.
        log_beta: float32 ``[layers, kv_heads, live]``.
        positions: int64 ``[layers, kv_heads, live]``, absolute.
        lengths: int64 ``[layers, kv_heads]``, live entries of each head, the rest being padding (position -1); None:
            all are live.
        fill: tokens since the last event, where heads share a budget.
        cursor: where the stream stands, of engines that read pictures.
    """

    seen: int
    key: FloatArray
    value: FloatArray
    log_beta: FloatArray
    positions: IntArray
    lengths: IntArray | None = None
    fill: int | None = None
    cursor: Cursor | None = None

    def __post_init__(self) -> None:
        rows = self.key.shape[:3]
        if self.value.shape != self.key.shape or self.log_beta.shape != rows or self.positions.shape != rows:
            raise StateError(
                f"state shapes differ: key {self.key.shape}, value {self.value.shape}, "
                f"log_beta {self.log_beta.shape}, positions {self.positions.shape}"
            )

    @property
    def live(self) -> int:
        """Slots of the longest head."""
        return int(self.key.shape[2])

    @property
    def count(self) -> int:
        """Live entries of all layers and heads."""
        return int(np.prod(self.key.shape[:3])) if self.lengths is None else int(self.lengths.sum())


class Engine(ABC):
    """A model over a bounded cache. Callers feed tokens; ``room`` tokens fit before the next eviction event.

    A call that raises leaves the cache as it was.

    Args:
        config: the cache's settings.
        num_layers, num_kv_heads, head_dim, vocab_size: shape of the model.
        position_limit: first position that is refused.

    Attributes:
        cursor: where a stream with pictures stands; None: the engine reads text only.
    """

    name: str = "engine"
    cursor: Cursor | None = None

    def __init__(
        self,
        config: CacheConfig,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        vocab_size: int,
        position_limit: int = POSITION_LIMIT,
    ) -> None:
        self.config = config
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.position_limit = position_limit
        self.seen = 0
        self.live = 0

    @property
    def room(self) -> int:
        """Tokens that fit before an eviction event is due; 0 when it is due now."""
        return self.config.slots - self.live

    @property
    def entries(self) -> int:
        """Live entries of all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.live

    def prefill(self, tokens: npt.ArrayLike) -> FloatArray:
        """Reads ``1 <= T <= min(room, prefill_chunk)`` tokens; returns the logits ``[vocab_size]`` after the last.

        Raises:
            StateError: too many tokens for the chunk or the room, one outside the vocabulary, or no list of integers.
            PositionLimitError: the stream would pass ``position_limit``.
        """
        given = np.asarray(tokens)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise StateError(f"tokens of shape {given.shape} and type {given.dtype} given: give a list of integers")
        ids = np.ascontiguousarray(given, dtype=np.int64)
        count = int(ids.size)
        allowed = min(self.room, self.config.prefill_chunk)
        if not 1 <= count <= allowed:
            hint = "call evict() first" if self.room == 0 else "split the chunk"
            raise StateError(f"{count} tokens given, but 1 to {allowed} fit now: {hint}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise StateError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}")
        if self.seen + count > self.position_limit:
            raise PositionLimitError(
                f"position {self.seen + count - 1} is past the last one this model computes rightly "
                f"({self.position_limit - 1}): start a new stream (reset)"
            )
        logits = self._forward(ids, self.seen, self.live)
        self.seen += count
        self.live += count
        return logits

    def decode(self, token: int) -> FloatArray:
        """Reads one token; returns the logits ``[vocab_size]`` after it."""
        return self.prefill([token])

    def evict(self) -> None:
        """Runs the eviction event: every KV head keeps its best ``budget`` entries.

        Raises:
            StateError: the buffer is not full.
        """
        if self.room:
            raise StateError(f"eviction runs when {self.config.slots} entries are live, now {self.live} are")
        self._evict(self.seen)
        self.live = self.config.budget

    def reset(self) -> None:
        """Empties the cache and starts a new stream at position 0."""
        self._reset()
        self.seen = 0
        self.live = 0

    def survivors(self) -> IntArray:
        """Positions of the live entries, int64 ``[layers, kv_heads, live]``, in slot order."""
        kept = self._kept_positions()[..., : self.live]
        if self.live <= kept.shape[-1]:
            return kept
        # Ring slots are filled in stream order, alike in every head.
        ring = np.arange(self.seen - self.live, self.seen, dtype=np.int64)[kept.shape[-1] :]
        return np.concatenate([kept, np.broadcast_to(ring, (*kept.shape[:2], ring.size))], axis=-1)

    def state(self) -> CacheState:
        """A copy of the live entries."""
        key, value, log_beta = self._read()
        live = self.live
        return CacheState(
            self.seen,
            key[:, :, :live].copy(),
            value[:, :, :live].copy(),
            log_beta[:, :, :live].copy(),
            self.survivors().copy(),
            cursor=self.cursor,
        )

    def load_state(self, state: CacheState) -> None:
        """Continues from ``state``, which any engine of the same model and settings may have made.

        Raises:
            StateError: the state belongs to another shape, its ring part is not the newest tokens, or its kept
                positions are impossible.
        """
        rows, live, budget = (self.num_layers, self.num_kv_heads), state.live, self.config.budget
        want = (*rows, live, self.head_dim)
        if state.lengths is not None:
            raise StateError("the state has heads of different lengths: it was made by a policy with a shared budget")
        if state.key.shape != want or live > self.config.slots or state.seen < live:
            raise StateError(
                f"state of shape {state.key.shape} with {state.seen} tokens seen does not fit this cache of "
                f"{rows[0]} layers x {rows[1]} heads x {self.config.slots} slots x {self.head_dim}"
            )
        ring = np.arange(state.seen - live, state.seen, dtype=np.int64)
        exact = 0 if state.seen == live else budget
        if not np.array_equal(
            state.positions[..., exact:], np.broadcast_to(ring[exact:], (*rows, max(live - exact, 0)))
        ):
            raise StateError(f"the state's ring does not hold the newest tokens for a budget of {budget}")
        if exact:
            self._check_kept(state)
        kept = np.broadcast_to(np.arange(budget, dtype=np.int64), (*rows, budget)).copy()
        kept[..., : min(live, budget)] = state.positions[..., :budget]
        self._write(state.key, state.value, state.log_beta, kept, state.seen, live)
        self.seen, self.live = state.seen, live

    def _check_kept(self, state: CacheState) -> None:
        """After the first event every head holds ``budget`` or more entries, the kept ones older than the ring."""
        live, budget = state.live, self.config.budget
        if live < budget or (state.seen - live) % self.config.buffer:
            raise StateError(
                f"the state holds {live} entries per head after {state.seen} tokens, which a budget of {budget} with a "
                f"buffer of {self.config.buffer} never does: load it with the settings it was made with"
            )
        kept = np.sort(state.positions[..., :budget], axis=-1)
        if kept.min() < 0 or kept.max() >= state.seen - (live - budget) or not np.all(np.diff(kept, axis=-1) > 0):
            raise StateError(
                "the state's kept positions are not distinct positions before its ring: the state is damaged"
            )

    @abstractmethod
    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        """Writes the chunk at slots ``[live, live + T)`` and returns the last token's logits ``[vocab_size]``."""

    @abstractmethod
    def _evict(self, seen: int) -> None: ...

    @abstractmethod
    def _reset(self) -> None: ...

    @abstractmethod
    def _kept_positions(self) -> IntArray:
        """``[layers, kv_heads, budget]``: positions in slots ``[0, budget)``; ``arange`` before the first event."""

    @abstractmethod
    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Key, value ``[layers, kv_heads, slots, head_dim]`` and log_beta ``[layers, kv_heads, slots]``."""

    @abstractmethod
    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        """Replaces the state; arrays as in :meth:`_read`, but only ``live`` slots of them, and as in
        :meth:`_kept_positions`. What lies behind those slots counts for nothing."""
