"""The climb to the first level that holds, and the table of what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_edge.budget import ModelShape, cache_bytes
from trimkv_edge.calibration.search import Trade, first_that_holds, percent
from trimkv_edge.config import CacheConfig

SHAPE = ModelShape(2, 8, 8, 2, 2, 4, 16, 1000)


@given(st.floats(0, 1), st.integers(0, 8))
def test_the_edge_is_enclosed(edge: float, halvings: int) -> None:
    """Levels at or above the edge hold: the answer does, and is no further above it than the last distance halved."""
    asked: list[float] = []

    def measure(level: float) -> float:
        asked.append(level)
        return float(level >= edge)

    found = first_that_holds([0.0, 0.25, 0.5, 1.0], measure, 1.0, halvings)
    assert found is not None
    assert found >= edge
    below = max((level for level in asked if level < edge), default=0.0)
    gap = 0.5 if edge > 0.5 else 0.25
    assert found - below <= gap / 2**halvings + 1e-12
    assert len(asked) <= 4 + halvings


def test_no_level_holds() -> None:
    assert first_that_holds([0.5, 1.0, 2.0], lambda level: 0.9, 0.95, 3) is None


def test_equal_caps_are_measured_once() -> None:
    kept = np.array([[1, 9, 12, 18], [2, 8, 13, 17], [3, 10, 14, 13], [9, 9, 11, 11]])
    config = CacheConfig(10, 4, 4, "global")
    asked: list[object] = []

    def agree(capped: CacheConfig) -> float:
        asked.append(capped.caps)
        return len(asked) / 10

    trade = Trade(kept, config, SHAPE, "float32", agree)
    assert [trade.measure(level) for level in (2.0, 0.75, 1.0, 2.0)] == [0.1, 0.2, 0.2, 0.1]
    assert asked == [((24, 24), (32, 40)), ((16, 16), (16, 24))]
    small, large = trade.points()
    assert (small.level, small.entries, small.agreement) == ("p75", 72, 0.2)
    assert (large.level, large.entries, large.agreement) == ("max x 2", 120, 0.1)
    # 72 entries and 4 rings of 4 with keys and values of 4 floats; tables of 4 heads, the widest cap 24 and its ring.
    assert small.bytes == (72 + 16) * 2 * 4 * 4 + 4 * ((24 + 4) * 4 + 24 * 8 + 8)
    assert large.bytes == cache_bytes(SHAPE, replace(config, caps=((24, 24), (32, 40))), "float32")


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.000 %"), (0.9999999, "99.999 %"), (0.99, "99.000 %"), (0.0, "0.000 %")]
)
def test_shares_are_rounded_down(share: float, text: str) -> None:
    assert percent(share) == text
