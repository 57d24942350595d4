"""Bootstrap intervals against what theory says."""

from __future__ import annotations

import numpy as np
import pytest

from trimkv_edge.evaluation.statistics import bootstrap, paired


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = bootstrap(values, np.ones(400))
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_streams_are_drawn_not_answers() -> None:
    """Eight alike answers per stream: the interval is that of 50 streams, far wider than that of 400 answers."""
    right = np.repeat([0.0, 1.0], 25)
    by_stream = bootstrap(8 * right, np.full(50, 8))
    assert by_stream.mean == 0.5
    assert by_stream.high - by_stream.low == pytest.approx(2 * 1.96 * 0.5 / 50**0.5, abs=0.03)


def test_ratio_weighs_answers() -> None:
    assert bootstrap([1.0, 9.0], [1, 10]).mean == pytest.approx(10 / 11)


def test_paired_differences_are_narrower_than_the_parts() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 8, 100)
    first, second, counts = hard + 0.5, hard + rng.normal(0, 0.1, 100), np.full(100, 8)
    gap = paired(first, second, counts)
    assert gap.low > 0
    assert gap.mean == pytest.approx((first - second).sum() / 800)
    assert gap.high - gap.low < 0.1 * (bootstrap(first, counts).high - bootstrap(first, counts).low)


def test_always_right() -> None:
    found = bootstrap([4.0, 4.0], [4, 4])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert str(found) == "1.000 [1.000, 1.000]"
