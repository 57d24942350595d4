"""The cheapest caps that keep enough of what the exact policy keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trimkv_edge.budget import ModelShape, cache_bytes
from trimkv_edge.calibration.levels import Caps, caps_at, level_name
from trimkv_edge.caps import TradePoint
from trimkv_edge.config import CacheConfig


def first_that_holds(
    levels: Sequence[float], measure: Callable[[float], float], target: float, halvings: int
) -> float | None:
    """Climbs rising levels to the first whose measure reaches the target, then halves the distance to the one below.

    Returns:
        a level that reaches the target; None if none of ``levels`` does.
    """
    failing = None
    for level in levels:
        if measure(level) >= target:
            break
        failing = level
    else:
        return None
    for _ in range(halvings if failing is not None else 0):
        assert failing is not None
        middle = (failing + level) / 2
        if measure(middle) >= target:
            level = middle
        else:
            failing = middle
    return level


@dataclass
class Trade:
    """Agreement of the caps of any level, each choice of caps measured once.

    Attributes:
        kept: int64 ``[events, rows]`` of the exact policy.
        config: its settings.
        shape, dtype: what bytes are counted for.
        agreement: share of survivors that a cache with the given settings holds too.
    """

    kept: npt.NDArray[np.int64]
    config: CacheConfig
    shape: ModelShape
    dtype: str
    agreement: Callable[[CacheConfig], float]

    def __post_init__(self) -> None:
        self._found: dict[Caps, TradePoint] = {}

    def capped(self, level: float) -> CacheConfig:
        """The settings with the caps of a level."""
        return replace(self.config, caps=caps_at(level, self.kept, self.shape.num_kv_heads, self.config))

    def point(self, level: float) -> TradePoint:
        """What a level costs and gives. Levels of equal caps are one point, named after the first asked for."""
        config = self.capped(level)
        assert config.caps is not None
        if config.caps not in self._found:
            entries = sum(map(sum, config.caps))
            size = cache_bytes(self.shape, config, self.dtype)
            self._found[config.caps] = TradePoint(level_name(level), entries, size, self.agreement(config))
        return self._found[config.caps]

    def measure(self, level: float) -> float:
        """Agreement at a level."""
        return self.point(level).agreement

    def points(self) -> list[TradePoint]:
        """All choices measured so far, smallest first."""
        return sorted(self._found.values(), key=lambda point: (point.bytes, point.agreement))


def percent(share: float) -> str:
    """``98.765 %``, rounded down: only what is whole reads 100 %."""
    return f"{math.floor(share * 1e5 + 1e-9) / 1e3:.3f} %"
