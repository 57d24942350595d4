"""How long each token of a stream stayed in the cache, head by head, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ConfigError

LEFT_NEVER = int(np.iinfo(np.int32).max)


class Departures(NamedTuple):
    """Per event: stream length, how many entries left, and the 10th, 50th and 90th percentile of their ages in tokens
    (nearest lower one; 0 where nothing left)."""

    seen: IntArray
    entries: IntArray
    low: IntArray
    median: IntArray
    high: IntArray


@dataclass(frozen=True)
class Lifetimes:
    """When each token left each KV head.

    A token at position ``p`` is held at stream length ``t`` where ``p < t < left``: an event runs right after the step
    that fills the cache, and counts as part of it.

    Attributes:
        left: int32 ``[layers, heads, tokens]``, stream length at which the token left; ``LEFT_NEVER``: held at the end.
        events: int64 ``[events]``, stream length at each eviction event, rising.
        heads: which KV heads of each layer the table has.

    Raises:
        ConfigError: the shapes do not belong together.
    """

    left: npt.NDArray[np.int32]
    events: IntArray
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.left.ndim != 3 or self.left.shape[1] != len(self.heads) or np.any(np.diff(self.events) <= 0):
            raise ConfigError(
                f"a table of shape {self.left.shape} for {len(self.heads)} heads and {self.events.size} events: give "
                "[layers, heads, tokens] and stream lengths that rise"
            )

    @property
    def tokens(self) -> int:
        """Length of the stream."""
        return int(self.left.shape[2])

    def held(self, seen: int) -> npt.NDArray[np.bool_]:
        """``[layers, heads, seen]``: which of the first ``seen`` tokens are held at that stream length."""
        return self.left[..., :seen] > seen

    def holders(self, seen: int) -> IntArray:
        """``[seen]``: heads that hold each token at that stream length."""
        return self.held(seen).sum((0, 1), dtype=np.int64)

    def occupancy(self, seen: int) -> IntArray:
        """``[layers, heads]``: entries held at that stream length."""
        return self.held(seen).sum(-1, dtype=np.int64)

    def mean_age(self, seen: int) -> FloatArray:
        """``[layers, heads]``: mean age in tokens of the entries held at that stream length; 0 where there are none."""
        ages = self.held(seen) @ (seen - np.arange(seen, dtype=np.int64))
        return (ages / np.maximum(self.occupancy(seen), 1)).astype(np.float32)

    def oldest_share(self, seen: int) -> FloatArray:
        """``[layers, heads]``: share of the entries that are from the first tenth of the first ``seen`` tokens."""
        old = self.held(seen)[..., : -(-seen // 10)].sum(-1)
        return (old / np.maximum(self.occupancy(seen), 1)).astype(np.float32)

    def ages(self, count: int = 120) -> IntArray:
        """At most ``count`` ages from 1 on, evenly spaced on a logarithmic scale, that a twentieth of the tokens
        reached."""
        last = max(1, self.tokens - self.tokens // 20)
        return np.unique(np.geomspace(1, last, count).round().astype(np.int64))

    def survival(self, ages: npt.ArrayLike) -> FloatArray:
        """``[layers, ages]``: of the tokens that reached an age (1 to ``tokens``), the share still held at it, over the
        layer's heads."""
        stays = self.left - np.arange(self.tokens)
        # The last position that reaches an age is tokens - age.
        columns = [(stays[..., : self.tokens - age + 1] > age).mean((1, 2)) for age in np.asarray(ages, np.int64)]
        return np.stack(columns, -1).astype(np.float32)

    def departures(self) -> Departures:
        """What left at each event, and how old it was."""
        rows = self.left.reshape(-1, self.tokens)
        # Newest first, so that the stable sort by event leaves each event's ages rising.
        newest_first = rows.T[::-1].reshape(-1)
        age = newest_first - np.repeat(np.arange(self.tokens)[::-1], rows.shape[0])
        gone = newest_first != LEFT_NEVER
        event = np.searchsorted(self.events, newest_first[gone])
        ages = np.append(age[gone][np.argsort(event, kind="stable")], 0)
        count = np.bincount(event, minlength=self.events.size)
        start = np.cumsum(count) - count
        low, median, high = (
            np.where(count > 0, ages[np.minimum(start + np.maximum(count - 1, 0) * tenths // 10, ages.size - 1)], 0)
            for tenths in (1, 5, 9)
        )
        return Departures(self.events, count, low, median, high)

    def raster(self, size: int = 400) -> FloatArray:
        """``[position, time]``, at most ``size`` each: share of the heads that hold the tokens of a stretch of the
        stream at a stream length, NaN before they are read."""
        bins = min(size, self.tokens)
        times = np.arange(1, bins + 1) * self.tokens // bins
        edges = np.arange(bins + 1) * self.tokens // bins
        rows = self.left.reshape(-1, self.tokens)
        out = np.full((bins, bins), np.nan, np.float32)
        for row in range(bins):
            part = np.sort(rows[:, edges[row] : edges[row + 1]].reshape(-1))
            # Not before the whole stretch is read.
            later = times[row:]
            out[row, row:] = 1 - np.searchsorted(part, later, side="right") / part.size
        return out
