"""Replays and agreement against naive lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.calibration.lifetimes import agreement
from trimkv_edge.calibration.replay import replay
from trimkv_edge.config import CacheConfig

LAYERS, HEADS = 3, 2
ROWS = LAYERS * HEADS
Held = dict[tuple[int, int], set[int]]


def gates(tokens: int, streams: int, seed: int) -> torch.Tensor:
    """Log-betas ``[streams, layers, tokens, heads]``; heads fade at very different rates, which change over time."""
    rng = np.random.default_rng(seed)
    pace = rng.exponential(0.5, (streams, LAYERS, 1, HEADS)) * np.exp(
        rng.normal(0, 1, (streams, LAYERS, tokens, HEADS))
    )
    return torch.from_numpy((-rng.exponential(0.3, pace.shape) * pace).astype(np.float32))


def naive(log_beta: torch.Tensor, config: CacheConfig) -> list[tuple[int, Held]]:
    """Tokens read and positions held by every head, after every event of one stream."""
    places = (config.budget, config.buffer, config.sinks, config.recent, config.lookahead)
    shared = (config.policy, config.min_per_head, config.threshold, config.caps)
    oracle = OracleCache(LAYERS, HEADS, *places, *shared)
    events = []
    for seen in range(1, log_beta.shape[1] + 1):
        for layer, head in np.ndindex(LAYERS, HEADS):
            oracle.append(layer, head, seen - 1, float(log_beta[layer, seen - 1, head]))
        if oracle.end_step(seen):
            events.append((seen, {where: set(oracle.positions(*where)) for where in np.ndindex(LAYERS, HEADS)}))
    return events


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_agreement_is_the_share_of_survivors_that_naive_lists_share(data: st.DataObject) -> None:
    buffer, budget = data.draw(st.sampled_from([1, 3, 8])), data.draw(st.integers(4, 10))
    config = CacheConfig(
        budget,
        buffer,
        1,
        data.draw(st.sampled_from(["global", "layer"])),
        sinks=data.draw(st.integers(0, 2)),
        recent=data.draw(st.integers(0, 2)),
        min_per_head=data.draw(st.integers(0, 3)),
        threshold=data.draw(st.sampled_from([0.0, 0.0, 0.4])),
    )
    every = [data.draw(st.integers(4, budget + 8)) for _ in range(ROWS)]
    every[0] += max(0, budget * ROWS - sum(every))
    caps = tuple(tuple(every[i * HEADS : (i + 1) * HEADS]) for i in range(LAYERS))
    capped = replace(config, caps=caps)
    streams = data.draw(st.integers(1, 2))
    log_beta = gates(budget + 4 * buffer + data.draw(st.integers(0, 2)), streams, data.draw(st.integers(0, 99)))
    got = agreement(replay(log_beta, config), replay(log_beta, capped), config)
    wanted = []
    for stream in range(streams):
        # Without caps and threshold the oracle knows no events before the pool is full; here only full ones count.
        exact, other = (
            {seen: held for seen, held in naive(log_beta[stream], chosen) if seen >= budget + buffer}
            for chosen in (config, capped)
        )
        assert exact.keys() == other.keys()
        shares = []
        for seen, held in exact.items():
            total = sum(len(positions) for positions in held.values())
            both = sum(len(positions & other[seen][where]) for where, positions in held.items())
            shares.append(both / total if total else 1.0)
        wanted.append(shares)
    assert got.shape == (len(wanted[0]), streams)
    np.testing.assert_allclose(got.T.numpy(), wanted, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["global", "layer"]), st.integers(1, 12), st.sampled_from([1, 4, 7]), st.integers(0, 99))
def test_caps_that_no_head_can_reach_change_nothing(policy: str, budget: int, buffer: int, seed: int) -> None:
    config = CacheConfig(budget, buffer, 1, policy)
    most = budget * (ROWS if policy == "global" else HEADS)
    log_beta = gates(budget + 6 * buffer, 2, seed)
    generous = replay(log_beta, replace(config, caps=((most,) * HEADS,) * LAYERS))
    shares = agreement(replay(log_beta, config), generous, config)
    assert shares.shape == (6, 2)
    assert (shares == 1).all()


def test_a_cap_costs_what_it_takes_from_its_head() -> None:
    """One head never forgets and the others forget at once, so it fills the pool of 4 x 6 = 24 entries but for those
    of the newest token; a cap of 8 leaves it 8 of them."""
    log_beta = torch.full((1, LAYERS, 28, HEADS), -100.0)
    log_beta[:, 1, :, 0] = -1e-6
    config = CacheConfig(4, 4, 4, "global")
    caps = ((8, 8), (8, 8), (8, 8))
    exact, capped = replay(log_beta, config), replay(log_beta, replace(config, caps=caps))
    alive = lambda lifetimes: (lifetimes.lasted[0] == len(lifetimes.seen)).sum(-1).tolist()  # noqa: E731
    assert exact.seen == [4, 8, 12, 16, 20, 24, 28]
    assert sum(alive(exact)) == sum(alive(capped)) == 24
    assert alive(exact)[2] == 24
    assert alive(capped)[2] == 8
    # At 8 tokens the head holds 8 in both, and its share of the 24 is a third.
    shares = agreement(exact, capped, config)[:, 0]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(8 / 24)


def test_a_threshold_that_empties_the_pool_leaves_nothing_to_miss() -> None:
    config = CacheConfig(2, 2, 2, "global", threshold=0.5)
    gone = replay(torch.full((1, LAYERS, 10, HEADS), -50.0), config)
    assert (gone.lasted == 0).all()
    assert (agreement(gone, gone, config) == 1).all()
