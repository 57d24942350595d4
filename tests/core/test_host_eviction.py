"""The event in numpy: against the oracle, against the torch policies, and that its moves are a compaction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import plan_moves, score_entries
from trimkv_edge.host_eviction import SCORES, HostEntries, leaving, log_sigmoid, moves, require_host, score
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import Entries
from trimkv_edge.retention import log_sigmoid as torch_log_sigmoid

SPECIAL = [0.0, -0.0, -1e38, -3.4e38, -1e-38, -1e-45, -1e-7, -0.5]
log_betas = st.one_of(st.floats(-20, 0, width=32), st.sampled_from([-0.5, -0.25, -0.125]), st.sampled_from(SPECIAL))


@st.composite
def events(draw: st.DrawFn) -> tuple[CacheConfig, HostEntries]:
    """A full cache of two heads, kept positions in any order; far streams too."""
    buffer = draw(st.sampled_from([1, 2, 3, 5, 8]))
    budget = draw(st.integers(1, 12))
    sinks = draw(st.integers(0, min(3, budget)))
    recent = draw(st.integers(0, min(3, budget - sinks)))
    config = CacheConfig(budget, buffer, 1, sinks=sinks, recent=recent)
    ahead = draw(st.sampled_from([0, 7, 100, 2**24 - 30]))
    seen = budget + buffer + ahead
    old = seen - buffer
    rows = []
    for _ in range(2):
        kept = st.lists(st.integers(0, old - 1), min_size=budget, max_size=budget, unique=True)
        rows.append([*(draw(kept) if ahead else range(budget)), *range(old, seen)])
    positions = np.array([rows])
    size = positions.size
    values = np.array(draw(st.lists(log_betas, min_size=size, max_size=size)), np.float32).reshape(positions.shape)
    if draw(st.booleans()):  # equal scores by construction, or nearly
        values = (np.float32(-4) / (seen + 1 - positions).astype(np.float32)).astype(np.float32)
    return config, HostEntries(values, positions, np.zeros((*positions.shape, 2), np.float32), seen)


@settings(max_examples=250, deadline=None)
@given(events())
def test_survivors_are_the_oracles_and_moves_compact_them(case: tuple[CacheConfig, HostEntries]) -> None:
    config, entries = case
    budget, buffer = config.budget, config.buffer
    oracle = OracleCache(1, 2, budget, buffer, config.sinks, config.recent)
    for head in range(2):
        for position, log_beta in zip(entries.positions[0, head], entries.log_beta[0, head], strict=True):
            oracle.append(0, head, int(position), float(log_beta))
    assert oracle.end_step(entries.seen)
    leaves = leaving(score(entries, config), entries.positions, buffer)
    for head in range(2):
        assert sorted(entries.positions[0, head][~leaves[0, head]]) == oracle.positions(0, head)
    row, to, source = moves(leaves, budget)
    moved = entries.positions.copy().reshape(2, -1)
    moved[row, to] = moved[row, source]
    for head in range(2):
        assert (row == head).sum() <= buffer
        assert sorted(moved[head, :budget]) == oracle.positions(0, head)
        stay = ~leaves[0, head, :budget]
        np.testing.assert_array_equal(moved[head, :budget][stay], entries.positions[0, head, :budget][stay])
    # The same slots as the moves of graphs, whose lists go on with moves onto itself.
    destination, origin = plan_moves(torch.from_numpy(~leaves.reshape(2, -1)), budget)
    graphs = entries.positions.reshape(2, -1).copy()
    np.put_along_axis(graphs, destination.numpy(), np.take_along_axis(graphs, origin.numpy(), 1), 1)
    np.testing.assert_array_equal(graphs[:, :budget], moved[:, :budget])


@pytest.mark.parametrize("policy", SCORES)
def test_scores_are_those_of_the_policy(policy: str) -> None:
    random = np.random.default_rng(0)
    config = CacheConfig(20, 12, 4, policy=policy, sinks=2, recent=3)
    seen, shape = 2000, (2, 3, 32)
    positions = np.stack([random.permutation(seen)[:32] for _ in range(6)]).reshape(shape)
    log_beta = -random.exponential(0.1, shape).astype(np.float32)
    key = random.normal(size=(*shape, 8)).astype(np.float32)
    tables = [torch.from_numpy(x).flatten(0, 1) for x in (log_beta, positions, key)]
    by_key = POLICIES[policy].key_score
    entries = Entries(*tables[:2], seen, 2, 3, key_score=by_key(tables[2]) if by_key else None)
    want = score_entries(entries, config).view(shape).numpy()
    np.testing.assert_allclose(score(HostEntries(log_beta, positions, key, seen), config), want, rtol=1e-5, atol=1e-6)


def test_log_sigmoid() -> None:
    z = torch.linspace(-110, 110, 4001)
    np.testing.assert_allclose(log_sigmoid(z.numpy()), torch_log_sigmoid(z).numpy(), rtol=3e-7, atol=1e-38)
    assert log_sigmoid(np.float32(17.5)) == np.float32(-2.510999e-8), "log(sigmoid(17.5)) in float32 is 0"
    assert log_sigmoid([-np.inf, np.inf]).tolist() == [-np.inf, 0.0]


def test_every_policy_that_graphs_hold_is_known_or_refused() -> None:
    for name, policy in POLICIES.items():
        if policy.exports and not policy.pooled:
            require_host(CacheConfig(8, 4, 4, policy=name))
        else:
            with pytest.raises(ConfigError, match="use one of trimkv, streaming, keydiff, random"):
                require_host(CacheConfig(8, 4, 4, policy=name))


def test_lookahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="lookahead is 2"):
        require_host(CacheConfig(8, 4, 4, lookahead=2))
