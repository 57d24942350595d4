"""Places in a stream: what a session needs beside the cache to go on from one, and the places it can go back to."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import CacheState, Cursor, Engine, FloatArray
from trimkv_edge.errors import ConfigError, SessionError
from trimkv_edge.runtime.sampling import SamplerState

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Place:
    """Where a stream stands, without its cache.

    Attributes:
        seen: tokens the engine has read.
        pending: newest generated token, which the engine has not read; None if there is none.
        newest: tokens before it that the detokeniser looks at.
        logits: float32 ``[vocab_size]`` after the last token that was read; None at the start.
        seen_tokens: uint8 ``[ceil(vocab_size / 8)]``, one bit for each token of the vocabulary: read or not.
        sampler: of the newest generation; None before the first.
        cursor: of an engine that reads pictures.
    """

    seen: int
    pending: int | None
    newest: tuple[int, ...]
    logits: FloatArray | None
    seen_tokens: ByteArray
    sampler: SamplerState | None
    cursor: Cursor | None = None

    @property
    def nbytes(self) -> int:
        return self.seen_tokens.nbytes + (0 if self.logits is None else self.logits.nbytes)


def earlier(state: CacheState, seen: int) -> CacheState:
    """``state`` as it was when ``seen`` tokens had been read, with no event in between: without its newest entries, and
    without a cursor if there were any."""
    drop = state.seen - seen
    if drop == 0:
        return state
    lengths = None if state.lengths is None else state.lengths - drop
    width = state.live - drop if lengths is None else int(lengths.max())
    key, value, log_beta = (table[:, :, :width].copy() for table in (state.key, state.value, state.log_beta))
    positions = state.positions[:, :, :width].copy()
    if lengths is not None:
        dead = np.arange(width) >= lengths[..., None]
        key[dead], value[dead], log_beta[dead], positions[dead] = 0, 0, 0, -1
    fill = None if state.fill is None else state.fill - drop
    return CacheState(seen, key, value, log_beta, positions, lengths, fill)


class Checkpoints:
    """The newest places that a session marked.

    Between events entries are only added, so a place costs no more than its own numbers: the cache of then is a prefix
    of the cache of now. Only an event that removes entries a place needs makes a copy first, one for all places since
    the event before.

    Args:
        limit: most places, so also most copies; 0 marks none.

    Raises:
        ConfigError: a limit below 0.
    """

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ConfigError(f"checkpoints is {limit!r}, but must be a whole number of at least 0 (0: none)")
        self.limit = limit
        self._places: deque[tuple[Place, CacheState | None]] = deque(maxlen=limit)
        self._marked = 0

    def __len__(self) -> int:
        return len(self._places)

    def clear(self) -> None:
        self._places.clear()
        self._marked = 0

    def mark(self, place: Place) -> None:
        """Adds a place; the oldest goes when there are too many."""
        if self.limit:
            self._places.append((place, None))
            self._marked += 1

    def before_event(self, engine: Engine) -> None:
        """Keeps what the event is about to remove, if a place needs it."""
        bare = [place for place, copy in self._places if copy is None]
        if bare:
            held = earlier(engine.state(), max(place.seen for place in bare))
            self._places = deque(
                ((place, held if copy is None else copy) for place, copy in self._places), maxlen=self.limit
            )

    def find(self, turns: int, engine: Engine) -> tuple[Place, CacheState]:
        """The place ``turns`` marks ago and the cache of then.

        Raises:
            ConfigError: ``turns`` below 1.
            SessionError: it is not held.
        """
        if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise ConfigError(f"turns is {turns!r}, but must be a whole number of at least 1")
        if self.limit == 0:
            raise SessionError("the session keeps no checkpoints: open it with checkpoints=K to go back K turns")
        if turns > len(self._places):
            raise SessionError(
                f"going back {turns} turns is not possible: {self._marked} were marked since the stream began or was "
                f"loaded and the newest {len(self._places)} are held (at most {self.limit}); what the cache held "
                "before was evicted: go back less far, start a new stream, or open the session with more checkpoints"
            )
        place, copy = self._places[-turns]
        state = earlier(engine.state() if copy is None else copy, place.seen)
        return place, replace(state, cursor=place.cursor)

    def drop(self, turns: int) -> None:
        """Forgets the newest ``turns`` places."""
        for _ in range(turns):
            self._places.pop()
        self._marked -= turns

    @property
    def nbytes(self) -> int:
        """Bytes held now, copies that places share counted once."""
        places = tuple(self._places)  # another thread may look
        copies = {id(copy): copy for _, copy in places if copy is not None}
        return sum(place.nbytes for place, _ in places) + sum(map(state_bytes, copies.values()))


def state_bytes(state: CacheState) -> int:
    """Bytes of a state's arrays."""
    tables = (state.key, state.value, state.log_beta, state.positions, state.lengths)
    return sum(table.nbytes for table in tables if table is not None)
