"""Who survives, against the oracle; and that the moves are an in-place compaction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import event_positions, plan_moves, select_survivors
from trimkv_edge.policies.base import Entries

F32 = np.float32
SPECIAL = [0.0, -0.0, -1e38, -3.4e38, -1e-38, -1e-45, -7e-45, -1e-7, -0.5]
log_betas = st.one_of(
    st.floats(-20, 0, width=32),
    st.sampled_from([-0.5, -0.25, -0.125]),
    st.sampled_from(SPECIAL),
    st.floats(-(2.0**-126), 0, width=32),
)


@st.composite
def events(draw: st.DrawFn) -> tuple[CacheConfig, int, list[list[int]], list[list[float]]]:
    """A full cache at an event: settings, tokens seen, and per row shuffled kept positions + the ring's."""
    buffer = draw(st.sampled_from([1, 2, 3, 5, 8, 13]))
    chunk = draw(st.sampled_from(sorted({1, (buffer + 1) // 2, buffer})))
    budget = draw(st.integers(chunk, chunk + 14))
    sinks = draw(st.sampled_from([0, 0, 1, 4]))
    recent = draw(st.sampled_from([0, 0, 1, 3]))
    sinks, recent = min(sinks, budget), min(recent, max(budget - min(sinks, budget), 0))
    config = CacheConfig(budget, buffer, chunk, sinks=sinks, recent=recent)
    ahead = draw(st.sampled_from([0, 0, 7, 100, 2**24 - 3, 2**24 + 1, 2**31 + 11]))
    seen = budget + buffer + ahead
    positions, values = [], []
    for _ in range(draw(st.integers(1, 3))):
        old = st.integers(0, seen - buffer - 1) if ahead else None
        kept = (
            list(range(budget)) if old is None else draw(st.lists(old, min_size=budget, max_size=budget, unique=True))
        )
        ring = list(range(seen - buffer, seen))
        row = draw(st.permutations(kept)) + ring if ahead else kept + ring
        if draw(st.integers(0, 3)):
            lbs = draw(st.lists(log_betas, min_size=len(row), max_size=len(row)))
        else:
            # Equal scores by construction: ages are small integers or exact floats, so -x / age times age is near x.
            lbs = [float(F32(-4.0) / F32(seen + 1 - p)) for p in row]
        positions.append(list(row))
        values.append([float(F32(lb)) for lb in lbs])
    return config, seen, positions, values


def oracle_rows(
    config: CacheConfig, seen: int, positions: list[list[int]], values: list[list[float]]
) -> list[list[int]]:
    oracle = OracleCache(1, len(positions), config.budget, config.buffer, config.sinks, config.recent, config.lookahead)
    for head, (row, lbs) in enumerate(zip(positions, values, strict=True)):
        for position, lb in zip(row, lbs, strict=True):
            oracle.append(0, head, position, lb)
    assert oracle.end_step(seen)
    return [oracle.positions(0, head) for head in range(len(positions))]


@settings(max_examples=250, deadline=None)
@given(events())
def test_survivors_equal_the_oracle(case: tuple[CacheConfig, int, list[list[int]], list[list[float]]]) -> None:
    config, seen, positions, values = case
    table = torch.tensor(positions)
    keep = select_survivors(Entries(torch.tensor(values, dtype=torch.float32), table, seen), config)
    assert keep.dtype == torch.bool
    assert keep.sum(-1).tolist() == [config.budget] * len(positions)
    got = [sorted(table[row][keep[row]].tolist()) for row in range(len(positions))]
    assert got == oracle_rows(config, seen, positions, values)
    check_compaction(keep, config.budget)


TIES = [
    # log_betas, positions, survivors; M = 2, B = 2, seen = 4. Scores: all equal -> the oldest leave.
    ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2, 3], [2, 3]),
    ([-1.0, -1.25, -5 / 3, -2.5], [0, 1, 2, 3], [2, 3]),
    ([-1e38, -1e38, -1e38, -2e38], [0, 1, 2, 3], [2, 3]),
    ([-3e38, -3e38, -3e38, -1e-3], [1, 0, 2, 3], [2, 3]),
    ([-1.0, -9.0, -9.0, -9.0], [0, 1, 2, 3], [0, 3]),
    ([0.0, -1e-45, -1e-45, 0.0], [1, 0, 2, 3], [1, 3]),
    ([-0.1, -0.1, -0.1, -9.0], [0, 1, 2, 3], [1, 2]),
]


@pytest.mark.parametrize(("log_beta", "positions", "survivors"), TIES)
def test_hand_written_ties(log_beta: list[float], positions: list[int], survivors: list[int]) -> None:
    config = CacheConfig(2, 2, 2)
    keep = select_survivors(Entries(torch.tensor([log_beta]), torch.tensor([positions]), 4), config)
    assert sorted(torch.tensor(positions)[keep[0]].tolist()) == survivors
    assert oracle_rows(config, 4, [positions], [log_beta]) == [survivors]


def test_positions_past_float32_do_not_collapse() -> None:
    """Neighbours that one float32 cannot tell apart: exact integer positions break the tie."""
    seen = 2**25 + 4
    row = [2**24 + 1, 2**24, seen - 2, seen - 1]
    entries = Entries(torch.tensor([[-1e-9, -1e-9, -1.0, 0.0]]), torch.tensor([row]), seen)
    keep = select_survivors(entries, CacheConfig(2, 2, 2))
    assert sorted(torch.tensor(row)[keep[0]].tolist()) == [2**24 + 1, seen - 1]


@pytest.mark.parametrize(("sinks", "recent", "want"), [(0, 0, [2, 3]), (2, 0, [0, 1]), (1, 1, [0, 5]), (0, 2, [4, 5])])
def test_protection(sinks: int, recent: int, want: list[int]) -> None:
    config = CacheConfig(2, 4, 2, sinks=sinks, recent=recent)
    log_beta = torch.tensor([[-9.0, -9.0, 0.0, 0.0, -9.0, -9.0]])
    keep = select_survivors(Entries(log_beta, torch.arange(6)[None], 6), config)
    assert torch.arange(6)[keep[0]].tolist() == want


@pytest.mark.parametrize("lookahead", [2, 9])
def test_look_ahead_survivors(lookahead: int) -> None:
    config = CacheConfig(24, 8, 8, lookahead=lookahead)
    log_beta = -torch.logspace(-4, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    positions = torch.arange(32)
    keep = select_survivors(Entries(log_beta[None], positions[None], 32), config)
    assert [positions[keep[0]].tolist()] == oracle_rows(config, 32, [positions.tolist()], [log_beta.tolist()])


def test_seen_as_tensor_gives_the_same_survivors() -> None:
    log_beta = -torch.rand(6, 12, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(6, -1)
    config = CacheConfig(8, 4, 4, sinks=1, recent=1)
    as_int = select_survivors(Entries(log_beta, positions, 12), config)
    assert torch.equal(as_int, select_survivors(Entries(log_beta, positions, torch.tensor([12])), config))


def test_unknown_policy() -> None:
    config = CacheConfig(4, 4, 4)
    object.__setattr__(config, "policy", "newest")
    with pytest.raises(ConfigError, match=r"'newest'.*trimkv"):
        select_survivors(Entries(torch.zeros(1, 8), torch.arange(8)[None], 8), config)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.randoms(use_true_random=False))
def test_moves_are_an_in_place_compaction(budget: int, buffer: int, rows: int, random) -> None:
    keep = torch.zeros(rows, budget + buffer, dtype=torch.bool)
    for row in keep:
        row[random.sample(range(budget + buffer), budget)] = True
    check_compaction(keep, budget)


def check_compaction(keep: torch.Tensor, budget: int) -> None:
    destination, source = plan_moves(keep, budget)
    buffer = keep.shape[-1] - budget
    assert destination.shape == source.shape == (keep.shape[0], buffer)
    assert destination.dtype == source.dtype == torch.int64
    for flags, to, origin in zip(keep.tolist(), destination.tolist(), source.tolist(), strict=True):
        slots = list(range(len(flags)))
        held, written = list(slots), set()
        for target, origin_slot in zip(to, origin, strict=True):
            assert origin_slot not in written, "a row is read after it was overwritten"
            held[target] = held[origin_slot]
            written.add(target)
        assert sorted(held[:budget]) == [slot for slot in slots if flags[slot]]
        assert len(set(to)) == buffer
        # What stays in the prefix is not touched: only holes are written.
        assert all(held[slot] == slot for slot in range(budget) if flags[slot])


def test_event_positions_are_kept_then_the_newest() -> None:
    kept = torch.tensor([[0, 5, 2], [7, 1, 3]])
    got = event_positions(kept, torch.tensor([12]), 4)
    assert got.tolist() == [[0, 5, 2, 8, 9, 10, 11], [7, 1, 3, 8, 9, 10, 11]]
    assert got.dtype == torch.int64
