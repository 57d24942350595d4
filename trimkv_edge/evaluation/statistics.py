"""Bootstrap intervals. The unit that is drawn is the stream: answers of one stream depend on each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval (95 %)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(totals: npt.ArrayLike, counts: npt.ArrayLike, seed: int = 0) -> Interval:
    """Interval of ``sum(totals) / sum(counts)`` over streams (Efron's percentile bootstrap of a ratio).

    Args:
        totals: per stream, sum of its answers' values.
        counts: per stream, number of answers (or tokens).
        seed: of the draws; intervals of methods that share samples use the same draws.
    """
    top, bottom = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    draw = np.random.default_rng(seed).integers(0, len(top), (DRAWS, len(top)))
    means = top[draw].sum(1) / bottom[draw].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def paired(first: npt.ArrayLike, second: npt.ArrayLike, counts: npt.ArrayLike, seed: int = 0) -> Interval:
    """Interval of the difference ``first - second`` of two methods that read the same streams."""
    return bootstrap(np.asarray(first, np.float64) - np.asarray(second, np.float64), counts, seed)
