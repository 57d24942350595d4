"""The cache of shared budgets over whole streams, against naive lists over all heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.cache import StaticCache, new_cache
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError, StateError
from trimkv_edge.policies.base import Entries
from trimkv_edge.pool import PooledCache
from trimkv_edge.pooled_eviction import select_pooled

LAYERS, HEADS, DIM = 3, 2, 5
ROWS = LAYERS * HEADS


class Stream:
    """A pool and one oracle per sequence, fed with the same rows. Gates differ much between heads, so that budgets
    move; ``levels`` makes equal scores common, and ``alike`` gives all heads the same log-betas."""

    def __init__(self, config: CacheConfig, batch: int = 1, seed: int = 0, levels: int = 0, alike: bool = False):
        self.config, self.batch, self.levels, self.alike = config, batch, levels, alike
        self.cache = new_cache(config, LAYERS, HEADS, DIM, batch)
        assert isinstance(self.cache, PooledCache)
        shared = (config.policy, config.min_per_head, config.threshold, config.caps)
        places = (config.budget, config.buffer, config.sinks, config.recent, config.lookahead)
        self.oracles = [OracleCache(LAYERS, HEADS, *places, *shared) for _ in range(batch)]
        self.rng = np.random.default_rng(seed)
        self.pace = self.rng.exponential(0.5, (LAYERS, HEADS))
        self.seen = self.events = 0

    def feed(self, count: int, query_heads: int = HEADS) -> list[tuple[np.ndarray, torch.Tensor]]:
        """One chunk through every layer; returns each layer's queries and attention output."""
        outputs = []
        for layer in range(LAYERS):
            rows = self.rng.standard_normal((2, self.batch, HEADS, count, DIM)).astype(np.float32)
            log_beta = -self.rng.exponential(0.3, (self.batch, count, HEADS)) * self.pace[layer]
            if self.alike:
                log_beta[:] = -0.25
            if self.levels:
                log_beta = np.ceil(log_beta * self.levels) / self.levels
            log_beta = log_beta.astype(np.float32)
            for sequence, i, head in np.ndindex(self.batch, count, HEADS):
                entry = (self.seen + i, float(log_beta[sequence, i, head]), *rows[:, sequence, head, i])
                self.oracles[sequence].append(layer, head, *entry)
            query = self.rng.standard_normal((self.batch, query_heads, count, DIM)).astype(np.float32)
            self.cache.retain(layer, torch.from_numpy(log_beta))
            key, value = (torch.from_numpy(part) for part in rows)
            outputs.append((query, self.cache.attend(layer, torch.from_numpy(query), key, value, 0.5)))
        self.cache.advance(count)
        self.seen += count
        return outputs

    def end_step(self) -> None:
        due = self.cache.room == 0
        ran = [oracle.end_step(self.seen) for oracle in self.oracles]
        if due:
            self.cache.evict()
        assert len(set(ran)) == 1
        assert due or not ran[0]
        self.events += ran[0]

    def check(self) -> None:
        """Every head holds the oracle's entries with their rows, and the pool is as large as promised."""
        cache, config = self.cache, self.config
        assert cache.key.shape == (self.batch, ROWS * (config.budget + config.buffer), DIM)
        held = cache.kept + cache.fill
        assert int(cache.kept.sum((1, 2)).max()) <= config.budget * ROWS
        for sequence, layer, head in np.ndindex(self.batch, LAYERS, HEADS):
            entries = self.oracles[sequence].entries(layer, head)
            start, count = int(cache._offsets[sequence, layer, head]), int(held[sequence, layer, head])
            positions = cache.positions[sequence, start : start + count]
            order = positions.argsort()
            assert positions[order].tolist() == [entry.position for entry in entries]
            log_beta = cache.log_beta[sequence, start : start + count][order]
            assert log_beta.tolist() == [entry.log_beta for entry in entries]
            for table, part in ((cache.key, "key"), (cache.value, "value")):
                want = np.array([getattr(entry, part) for entry in entries], np.float32).reshape(-1, DIM)
                assert np.array_equal(table[sequence, start : start + count][order].numpy(), want)

    def run(self, total: int, most: Sequence[int] = (1, 2, 3, 5)) -> None:
        while self.seen < total:
            self.feed(min(int(self.rng.choice(most)), self.cache.room, total - self.seen))
            self.end_step()
            self.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_stream_gives_the_oracles_entries(data: st.DataObject) -> None:
    buffer = data.draw(st.sampled_from([1, 2, 5, 8]))
    budget = data.draw(st.integers(1, 12))
    sinks = data.draw(st.integers(0, min(3, budget)))
    recent = data.draw(st.integers(0, min(2, budget - sinks)))
    floor = data.draw(st.integers(0, budget))
    caps = None
    if data.draw(st.booleans()):
        low = max(floor, sinks + recent, 1)
        every = [data.draw(st.integers(low, budget + 6)) for _ in range(ROWS)]
        every[data.draw(st.integers(0, ROWS - 1))] += max(0, budget * ROWS - sum(every))
        caps = tuple(tuple(every[i * HEADS : (i + 1) * HEADS]) for i in range(LAYERS))
    config = CacheConfig(
        budget,
        buffer,
        1,
        data.draw(st.sampled_from(["global", "layer"])),
        sinks,
        recent,
        data.draw(st.sampled_from([1, 1, 3])),
        floor,
        data.draw(st.sampled_from([0.0, 0.0, 0.3])),
        caps,
    )
    stream = Stream(
        config,
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(0, 99)),
        # A sum of exponentials, so levels are for the single-step score; the look-ahead one rounds differently.
        data.draw(st.sampled_from([0, 4])) if config.lookahead == 1 else 0,
        data.draw(st.booleans()) and config.lookahead == 1,
    )
    stream.run(budget + 5 * buffer, range(1, buffer + 1))


def test_of_equal_scores_older_entries_leave_first_and_then_lower_heads() -> None:
    """All log-betas are 0, so all scores are equal: 3 + 2 tokens, 18 places, 12 leave: both oldest of each head; then
    with 19 places for 24 entries the two oldest positions are gone from all and five heads lose position 2."""
    stream = Stream(CacheConfig(3, 2, 2, "global"))
    stream.pace[:] = 0
    stream.run(5)
    assert all(stream.oracles[0].positions(*where) == [2, 3, 4] for where in np.ndindex(LAYERS, HEADS))
    stream = Stream(CacheConfig(4, 5, 4, "global", caps=((19, 1), (1, 1), (1, 1))))
    stream.pace[:] = 0
    stream.run(9)
    held = [stream.oracles[0].positions(*where) for where in np.ndindex(LAYERS, HEADS)]
    assert held == [list(range(9)), *[[8]] * 5]


def test_lower_heads_lose_ties_between_heads() -> None:
    entries = Entries(torch.zeros(4, 3), torch.arange(3).expand(4, -1), 3, 2, 2)
    keep = select_pooled(entries, torch.tensor([[1, 1, 1]] * 3 + [[1, 1, 0]]).bool(), CacheConfig(2, 1, 1, "global"))
    # 11 entries for 8 places: position 0 of heads (0, 0), (0, 1) and (1, 0) goes first.
    assert keep.tolist() == [[False, True, True]] * 3 + [[True, True, False]]


@pytest.mark.parametrize("query_heads", [2, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_equals_float64_softmax(query_heads: int, batch: int) -> None:
    stream = Stream(CacheConfig(7, 5, 5, "global"), batch, 3)
    while stream.seen < 40:
        first = stream.seen
        count = min(stream.cache.room, 3)
        for layer, (query, out) in enumerate(stream.feed(count, query_heads)):
            assert out.shape == (batch, count, query_heads, DIM)
            for sequence, i, head in np.ndindex(batch, count, query_heads):
                want = stream.oracles[sequence].attend(
                    layer, head // (query_heads // HEADS), query[sequence, head, i], 0.5, up_to=first + i
                )
                np.testing.assert_allclose(out[sequence, i, head].numpy(), want, atol=2e-6)
        stream.end_step()
    lengths = stream.cache.kept
    assert int(lengths.max()) >= 2 * int(lengths.min()) + 1, "budgets did not move between heads"


def test_reset_starts_over() -> None:
    stream = Stream(CacheConfig(4, 3, 3, "global"))
    stream.run(20)
    stream.cache.reset()
    fresh = Stream(stream.config)
    fresh.cache = stream.cache
    fresh.run(20)
    assert stream.events == fresh.events == 5


def test_refusals_change_nothing() -> None:
    stream = Stream(CacheConfig(4, 3, 3, "global"))
    stream.run(11, [1])
    assert stream.cache.room == 2
    with pytest.raises(StateError, match="2 slots are free"):
        stream.cache.evict()
    with pytest.raises(StateError, match="3 tokens does not fit 2"):
        stream.cache.attend(0, *(torch.zeros(1, HEADS, 3, DIM) for _ in range(3)), 1.0)
    stream.check()


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"caps": ((8,) * 3,) * LAYERS}, ConfigError, "caps are for 3 layers x 3 KV heads, but the model has 3 x 2"),
        ({"caps": ((8, 8), (8,), (8, 8))}, ConfigError, "one number for each KV head"),
        ({"caps": ((3, 3),) * LAYERS}, BudgetError, "18 entries, fewer than a budget of 4 for each of 6 heads"),
        ({"caps": ((8, 1),) * LAYERS, "min_per_head": 2}, BudgetError, "cap of 1 entries is below the 2"),
        ({"min_per_head": 5}, BudgetError, "min per head 5 needs more entries than the budget of 4"),
        ({"threshold": 1.0}, ConfigError, r"threshold is 1.0, but a retention lies in \[0, 1\)"),
        ({"threshold": -0.1}, ConfigError, "threshold is -0.1"),
        ({"threshold": 0.5, "policy": "trimkv"}, ConfigError, r"share a budget \(global, layer\), not for trimkv"),
        ({"min_per_head": 1, "policy": "streaming"}, ConfigError, "min per head is for policies"),
        ({"caps": ((8, 8),) * LAYERS, "policy": "trimkv"}, ConfigError, "caps is for policies"),
    ],
)
def test_settings_that_cannot_be_honoured(more: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        new_cache(CacheConfig(**{"budget": 4, "buffer": 2, "prefill_chunk": 2, "policy": "global", **more}), 3, 2, DIM)


def test_per_head_policies_have_the_static_cache() -> None:
    assert isinstance(new_cache(CacheConfig(4, 2, 2), LAYERS, HEADS, DIM), StaticCache)
    with pytest.raises(ConfigError, match="heads of different lengths"):
        StaticCache(CacheConfig(4, 2, 2, "global"), LAYERS, HEADS, DIM)
