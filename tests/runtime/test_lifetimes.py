"""What follows from a table of lifetimes, against counting token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.lifetimes import LEFT_NEVER, Lifetimes

# Two layers of two heads, six tokens, events at 4 and 6; - is held at the end.
_TABLE = [
    [[4, 6, None, 4, None, 6], [None, 4, 4, None, 6, 6]],
    [[4, 4, 4, 4, 6, None], [6, 6, 6, 6, None, None]],
]
HAND = Lifetimes(
    np.array([[[LEFT_NEVER if at is None else at for at in head] for head in layer] for layer in _TABLE], np.int32),
    np.array([4, 6]),
    (0, 1),
)


@st.composite
def tables(draw: st.DrawFn) -> Lifetimes:
    tokens = draw(st.integers(1, 40))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    events = sorted(draw(st.sets(st.integers(1, tokens), max_size=8)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    left = np.full((layers, heads, tokens), LEFT_NEVER, np.int32)
    for where in np.ndindex(left.shape):
        later = [event for event in events if event > where[2]]
        if later and random.random() < 0.9:
            left[where] = random.choice(later)
    return Lifetimes(left, np.array(events, np.int64), tuple(range(heads)))


def test_a_table_by_hand() -> None:
    assert HAND.holders(3).tolist() == [4, 4, 4]
    assert HAND.holders(4).tolist() == [2, 2, 2, 2]
    assert HAND.holders(5).tolist() == [2, 2, 2, 2, 4]
    assert HAND.occupancy(4).tolist() == [[2, 2], [0, 4]]
    # Head (0, 0) holds tokens 1 and 2 after four, head (0, 1) tokens 0 and 3.
    assert HAND.mean_age(4).tolist() == [[2.5, 2.5], [0, 2.5]]
    assert HAND.oldest_share(4).tolist() == [[0, 0.5], [0, 0.25]]
    found = HAND.departures()
    assert [row.tolist() for row in found] == [[4, 6], [8, 9], [1, 1], [2, 3], [4, 5]]
    # Age 3 is reached by tokens 0 to 3. Layer 0 still holds 0 1 2 at 3, 4, 5 and 0 3 at 3, 6.
    assert HAND.survival([3])[0, 0] == np.float32(5 / 8)


@given(tables())
@settings(max_examples=60, deadline=None)
def test_derivations_count_tokens(table: Lifetimes) -> None:
    layers, heads, tokens = table.left.shape

    def held(layer: int, head: int, position: int, seen: int) -> bool:
        return position < seen and int(table.left[layer, head, position]) > seen

    rows = [(layer, head) for layer in range(layers) for head in range(heads)]
    for seen in range(1, tokens + 1):
        ages = {row: [seen - p for p in range(seen) if held(*row, p, seen)] for row in rows}
        assert table.occupancy(seen).reshape(-1).tolist() == [len(ages[row]) for row in rows]
        assert table.holders(seen).tolist() == [sum(seen - p in ages[row] for row in rows) for p in range(seen)]
        means = [float(np.mean(ages[row])) if ages[row] else 0.0 for row in rows]
        np.testing.assert_allclose(table.mean_age(seen).reshape(-1), means, rtol=1e-6)
        old = [sum(age > seen - -(-seen // 10) for age in ages[row]) / max(1, len(ages[row])) for row in rows]
        np.testing.assert_allclose(table.oldest_share(seen).reshape(-1), old, rtol=1e-6)
    for layer in range(layers):
        shares = [
            np.mean([held(layer, head, p, p + age) for head in range(heads) for p in range(tokens - age + 1)])
            for age in range(1, tokens + 1)
        ]
        np.testing.assert_allclose(table.survival(range(1, tokens + 1))[layer], shares, rtol=1e-6)
    found = table.departures()
    for event, seen in enumerate(table.events):
        ages = sorted(
            int(seen) - p for layer, head in rows for p in range(tokens) if table.left[layer, head, p] == seen
        )
        want = [ages[(len(ages) - 1) * tenths // 10] if ages else 0 for tenths in (1, 5, 9)]
        got = [found.low[event], found.median[event], found.high[event]]
        assert (found.seen[event], found.entries[event], got) == (seen, len(ages), want)


@given(tables(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_raster_is_the_share_at_each_moment(table: Lifetimes, size: int) -> None:
    raster = table.raster(size)
    bins = min(size, table.tokens)
    assert raster.shape == (bins, bins)
    for row in range(bins):
        first, last = row * table.tokens // bins, (row + 1) * table.tokens // bins
        for column in range(bins):
            seen = (column + 1) * table.tokens // bins
            part = table.left[..., first:last]
            want = np.nan if column < row else float((part > seen).mean())
            np.testing.assert_allclose(raster[row, column], want, rtol=1e-5, atol=1e-6)


def test_ages_rise_to_what_a_twentieth_reached() -> None:
    table = Lifetimes(np.full((1, 1, 2000), LEFT_NEVER, np.int32), np.zeros(0, np.int64), (0,))
    ages = table.ages(50)
    assert (ages[0], ages[-1], len(ages) <= 50, bool(np.all(np.diff(ages) > 0))) == (1, 1900, True, True)
    assert HAND.ages().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("shape", "events", "heads"), [((2, 2, 5), [3, 3], (0, 1)), ((2, 2, 5), [3], (0,)), ((2, 5), [3], (0, 1))]
)
def test_what_does_not_belong_together_is_refused(
    shape: tuple[int, ...], events: list[int], heads: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"give \[layers, heads, tokens\]"):
        Lifetimes(np.zeros(shape, np.int32), np.array(events), heads)
