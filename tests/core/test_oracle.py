"""The oracle itself, on cases small enough to work out by hand."""

from __future__ import annotations

import math

from oracle import OracleCache, oracle_score


def filled(rows: dict[tuple[int, int], list[float]], **settings: object) -> OracleCache:
    layers = 1 + max(layer for layer, _ in rows)
    heads = 1 + max(head for _, head in rows)
    oracle = OracleCache(layers, heads, **settings)  # type: ignore[arg-type]
    for (layer, head), log_betas in rows.items():
        for position, log_beta in enumerate(log_betas):
            oracle.append(layer, head, position, log_beta)
    return oracle


def test_score_counts_the_newest_token_twice_old() -> None:
    # n + 1 - pos with pos = n - 1.
    assert oracle_score(-0.5, 3, 4) == -1.0
    assert oracle_score(-0.25, 0, 4) == -1.25
    assert abs(oracle_score(-0.25, 0, 4, lookahead=2) - math.log(math.exp(-1.5) + math.exp(-1.75))) < 1e-6


def test_no_event_before_the_ring_is_full() -> None:
    oracle = filled({(0, 0): [-1.0, -2.0]}, budget=1, buffer=2)
    assert oracle.room() == 1
    assert not oracle.end_step(2)
    oracle.append(0, 0, 2, -0.1)
    assert oracle.end_step(3)
    assert oracle.positions(0, 0) == [2]


def test_global_policy_lets_heads_compete() -> None:
    rows = {(0, 0): [-0.1, -0.1, -0.1], (0, 1): [-5.0, -5.0, -5.0]}
    free = filled(rows, budget=1, buffer=2, policy="global")
    assert free.end_step(3)
    assert (free.positions(0, 0), free.positions(0, 1)) == ([1, 2], [])
    floored = filled(rows, budget=1, buffer=2, policy="global", min_per_head=1)
    floored.end_step(3)
    assert (floored.positions(0, 0), floored.positions(0, 1)) == ([2], [2])


def test_global_ties_leave_by_age_then_layer_then_head() -> None:
    rows = {(layer, head): [0.0, 0.0] for layer in range(2) for head in range(2)}
    oracle = filled(rows, budget=1, buffer=1, policy="global")
    oracle.end_step(2)
    assert all(oracle.positions(*where) == [1] for where in rows)
    for where in [(0, 0), (0, 1), (1, 0)]:
        oracle.append(*where, 1 + 1, 0.0)
    oracle.append(1, 1, 2, -9.0)
    oracle.end_step(3)
    # (1, 1)'s newest is the worst; then three of the four tied entries at position 1, the last head's stays.
    assert [oracle.positions(*where) for where in rows] == [[2], [2], [2], [1]]


def test_attend_is_a_weighted_mean() -> None:
    oracle = OracleCache(1, 1, 4, 1)
    oracle.append(0, 0, 0, 0.0, [0.0], [1.0])
    oracle.append(0, 0, 1, 0.0, [math.log(3)], [5.0])
    assert abs(oracle.attend(0, 0, [1.0], 1.0)[0] - 4.0) < 1e-12
    assert oracle.attend(0, 0, [1.0], 1.0, up_to=0) == [1.0]
    assert OracleCache(1, 1, 4, 1).attend(0, 0, [1.0], 1.0) == [0.0]
