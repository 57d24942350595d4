"""What engines do where heads share a budget: each head has its own number of kept entries, the ring is common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from trimkv_edge.engine import CacheState, Engine, IntArray
from trimkv_edge.errors import StateError


class PooledEngine(Engine):
    """An engine over a shared budget; ``live`` counts the ring only.

    Attributes:
        kept: int64 ``[layers, kv_heads]``, entries that each head kept at the last event.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.kept: IntArray = np.zeros((self.num_layers, self.num_kv_heads), np.int64)

    @property
    def room(self) -> int:
        """Tokens that fit before an eviction event is due; 0 when it is due now."""
        return self.config.segment(self.seen == self.live) - self.live

    @property
    def entries(self) -> int:
        """Live entries of all layers and heads."""
        return int(self.kept.sum()) + self.kept.size * self.live

    def evict(self) -> None:
        """Runs the eviction event: of all entries that compete the best stay.

        Raises:
            StateError: the ring is not full.
        """
        if self.room:
            raise StateError(f"eviction runs when the ring is full, now {self.room} slots are free")
        self._evict(self.seen)
        self.kept = self._lengths()
        self.live = 0

    def reset(self) -> None:
        """Empties the cache and starts a new stream at position 0."""
        super().reset()
        self.kept = np.zeros_like(self.kept)

    def survivors(self) -> IntArray:
        """Positions of the live entries, int64 ``[layers, kv_heads, most]``, in slot order; -1 behind a head's last."""
        lengths = self.kept + self.live
        slot = np.arange(int(lengths.max()), dtype=np.int64)
        table = np.zeros((*self.kept.shape, slot.size), np.int64)
        known = self._kept_positions()[..., : slot.size]
        table[..., : known.shape[-1]] = known
        kept, lengths = self.kept[..., None], lengths[..., None]
        ring = self.seen - self.live + slot - kept
        return np.where(slot < kept, table, np.where(slot < lengths, ring, -1))

    def state(self) -> CacheState:
        """A copy of the live entries, each head padded to the longest."""
        lengths = self.kept + self.live
        dead = np.arange(int(lengths.max())) >= lengths[..., None]
        key, value, log_beta = (table[:, :, : dead.shape[-1]].copy() for table in self._read())
        for table in (key, value, log_beta):
            table[dead] = 0
        return CacheState(self.seen, key, value, log_beta, self.survivors(), lengths, self.live, self.cursor)

    def load_state(self, state: CacheState) -> None:
        """Continues from ``state``, which any engine of the same model and settings may have made.

        Raises:
            StateError: the state belongs to another shape or other settings, or its positions are impossible.
        """
        rows, most = (self.num_layers, self.num_kv_heads), state.live
        if state.key.shape != (*rows, most, self.head_dim):
            raise StateError(
                f"state of shape {state.key.shape} does not fit this cache of {rows[0]} layers x {rows[1]} heads x "
                f"{self.head_dim}"
            )
        kept, fill = self._check_lengths(state)
        slot = np.arange(most)
        ring = state.seen - fill + slot - kept[..., None]
        inside = (slot >= kept[..., None]) & (slot < kept[..., None] + fill)
        if not np.array_equal(state.positions[inside], ring[inside]):
            raise StateError("the state's ring does not hold the newest tokens: the state is damaged")
        for where in np.ndindex(rows):
            held = np.sort(state.positions[where][: kept[where]])
            if held.size and (held[0] < 0 or held[-1] >= state.seen - fill or not np.all(np.diff(held) > 0)):
                raise StateError(
                    "the state's kept positions are not distinct positions before its ring: the state is damaged"
                )
        self.kept = kept
        self._write(state.key, state.value, state.log_beta, state.positions, state.seen, fill)
        self.seen, self.live = state.seen, fill

    def _check_lengths(self, state: CacheState) -> tuple[IntArray, int]:
        """Entries that each head kept, and the ring's fill."""
        config, fill = self.config, state.fill
        if state.lengths is None or fill is None:
            raise StateError("the state has no lengths: it was made by a policy with a budget for each head")
        first = state.seen == fill
        events = state.seen - fill
        kept = state.lengths - fill
        if not 0 <= fill <= config.segment(first) or (not first and (events - config.budget) % config.buffer):
            raise StateError(
                f"{fill} tokens since the last event after {state.seen} never happen with a budget of {config.budget} "
                f"and a buffer of {config.buffer}: load the state with the settings it was made with"
            )
        by_layer = kept.sum(-1)
        share = config.budget * kept.shape[-1]
        over = by_layer.max() > share if config.policy == "layer" else by_layer.sum() > share * kept.shape[0]
        beyond = config.caps is not None and bool((kept > np.array(config.caps)).any())
        if over or beyond or kept.min() < 0 or state.lengths.max() > state.live or (first and kept.any()):
            raise StateError("the state's heads hold more entries than these settings allow: it is of another cache")
        return kept.astype(np.int64), fill

    @abstractmethod
    def _lengths(self) -> IntArray:
        """``[layers, kv_heads]``: entries that each head kept at the event that just ran."""
