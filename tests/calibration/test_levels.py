"""Caps of a level, on tables small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_edge.calibration.levels import LADDER, caps_at, level_name
from trimkv_edge.config import CacheConfig

# Four rows (2 layers x 2 heads) after four events of a pool of 4 x 10 entries.
KEPT = np.array([[1, 9, 12, 18], [2, 8, 13, 17], [3, 10, 14, 13], [9, 9, 11, 11]])
CONFIG = CacheConfig(10, 4, 4, "global")


@pytest.mark.parametrize(
    ("level", "caps"),
    [
        # Sorted: 1 2 3 9 | 8 9 9 10 | 11 12 13 14 | 11 13 17 18; quantiles that were seen, rounded up to 8.
        (0.5, ((8, 16), (16, 24))),
        (0.75, ((16, 16), (16, 24))),
        (1.0, ((16, 16), (16, 24))),
        (1.5, ((16, 16), (24, 32))),  # 13.5, 15, 21, 27
        (2.0, ((24, 24), (32, 40))),  # 18, 20, 28, 36
    ],
)
def test_caps_of_a_table(level: float, caps: object) -> None:
    assert caps_at(level, KEPT, 2, CONFIG) == caps


def test_heads_that_are_shortest_of_their_mean_are_raised_until_the_caps_hold_the_budget() -> None:
    """Minima 0 0 8 8 give 8 8 8 8 = 32, and 80 are needed. Means are 4, 20, 16, 40: the last is raised to 16 (8/40),
    the second to 16 (8/20), the last to 24 (16/40), then the third (8/16), the last (24/40), the second (16/20)."""
    kept = np.array([[0, 0, 24, 56], [8, 40, 8, 24]])
    assert caps_at(0.0, kept, 2, CacheConfig(20, 4, 4, "global")) == ((8, 24), (16, 32))


def test_every_layer_keeps_its_own_budget() -> None:
    """In layer 1 the minima 4 and 4 give 8 + 8, and 40 are needed; means 20 and 20. Layer 0 has enough."""
    kept = np.array([[20, 20, 4, 36], [20, 20, 36, 4]])
    assert caps_at(0.0, kept, 2, CacheConfig(20, 4, 4, "layer")) == ((24, 24), (24, 16))


def test_bounds() -> None:
    """No head goes below what it must be able to keep, nor above what it ever can."""
    kept = np.array([[0, 100], [0, 100]])
    floor = CacheConfig(50, 4, 4, "global", min_per_head=11)
    assert caps_at(2.0, kept, 2, floor) == ((16, 104),)
    protected = CacheConfig(50, 4, 4, "global", sinks=4, recent=20)
    assert caps_at(1.0, kept, 2, protected) == ((24, 104),)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from(["global", "layer"]))
def test_caps_rise_with_the_level_and_always_hold_the_budget(seed: int, budget: int, policy: str) -> None:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet([0.4] * 2, (20, 3)) / 3 if policy == "layer" else rng.dirichlet([0.4] * 6, 20)
    kept = np.floor(share.reshape(20, 6) * budget * 6 + 1e-6).astype(np.int64)
    config = CacheConfig(budget, 1, 1, policy)
    before = 0
    for level in LADDER:
        caps = np.array(caps_at(level, kept, 2, config))
        assert (caps % 8 == 0).all()
        assert caps.min() >= 8
        assert caps.sum() >= 6 * budget
        assert policy == "global" or caps.sum(1).min() >= 2 * budget
        assert caps.sum() >= before
        before = caps.sum()
        over = (kept > caps.reshape(-1)).mean(0)
        assert (over <= max(0, 1 - level) + 1e-9).all()


def test_names() -> None:
    assert [level_name(level) for level in (0.0, 0.5, 0.985, 1.0, 1.05)] == ["p0", "p50", "p98.5", "max", "max x 1.05"]
