"""The static cache over whole streams, against the oracle: survivors, rows bit for bit, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError

LAYERS, HEADS, DIM = 2, 2, 4


class Stream:
    """A cache and one oracle per sequence, fed with the same rows; a row's content says where it belongs."""

    def __init__(self, config: CacheConfig, batch: int, seed: int, levels: int = 0, random_rows: bool = False) -> None:
        self.config, self.batch, self.random_rows = config, batch, random_rows
        self.cache = StaticCache(config, LAYERS, HEADS, DIM, batch)
        self.oracles = [
            OracleCache(LAYERS, HEADS, config.budget, config.buffer, config.sinks, config.recent, config.lookahead)
            for _ in range(batch)
        ]
        self.rng = np.random.default_rng(seed)
        self.levels = levels
        self.seen = 0

    def rows(self, position: int, layer: int) -> np.ndarray:
        """Key and value rows ``[2, batch, HEADS, DIM]`` of one token."""
        if self.random_rows:
            return self.rng.standard_normal((2, self.batch, HEADS, DIM)).astype(np.float32)
        rows = np.empty((2, self.batch, HEADS, DIM), np.float32)
        for kind, sequence, head in np.ndindex(2, self.batch, HEADS):
            rows[kind, sequence, head] = [position, layer + 10 * kind, head, sequence]
        return rows

    def feed(self, count: int, query_heads: int = HEADS) -> list[tuple[np.ndarray, torch.Tensor]]:
        """One chunk through every layer; returns each layer's queries and attention output."""
        outputs = []
        for layer in range(LAYERS):
            rows = np.stack([self.rows(self.seen + i, layer) for i in range(count)], axis=3)
            log_beta = -self.rng.exponential(0.3, (self.batch, count, HEADS)).astype(np.float32)
            if self.levels:
                log_beta = np.ceil(log_beta * self.levels) / np.float32(self.levels)
            for sequence, oracle in enumerate(self.oracles):
                for i in range(count):
                    for head in range(HEADS):
                        oracle.append(
                            layer, head, self.seen + i, float(log_beta[sequence, i, head]), *rows[:, sequence, head, i]
                        )
            query = self.rng.standard_normal((self.batch, query_heads, count, DIM)).astype(np.float32)
            key, value = (torch.from_numpy(part) for part in rows)
            outputs.append((query, self.cache.attend(layer, torch.from_numpy(query), key, value, 0.5)))
            self.cache.retain(layer, torch.from_numpy(log_beta))
        self.cache.advance(count)
        self.seen += count
        return outputs

    def end_step(self) -> None:
        ran = [oracle.end_step(self.seen) for oracle in self.oracles]
        assert set(ran) == {self.cache.live == self.config.slots}
        if ran[0]:
            self.cache.evict()

    def check(self) -> None:
        cache, live = self.cache, self.cache.live
        assert cache.seen == self.seen
        for sequence, layer, head in np.ndindex(self.batch, LAYERS, HEADS):
            entries = self.oracles[sequence].entries(layer, head)
            positions = cache.positions[sequence, layer, head, :live]
            order = positions.argsort()
            assert positions[order].tolist() == [entry.position for entry in entries]
            log_beta = cache.log_beta[sequence, layer, head, :live][order]
            assert log_beta.tolist() == [entry.log_beta for entry in entries]
            for table, part in ((cache.key, "key"), (cache.value, "value")):
                want = np.array([getattr(entry, part) for entry in entries], np.float32).reshape(-1, DIM)
                assert np.array_equal(table[layer][sequence, head, :live][order].numpy(), want)


def chunks(total: int, room: Callable[[], int], pick: Callable[[int], int]) -> Iterator[int]:
    """Splits ``total`` tokens into chunks that meet the event boundaries."""
    while total:
        count = pick(min(room(), total))
        yield count
        total -= count


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chunking_gives_the_oracles_entries(data: st.DataObject) -> None:
    buffer = data.draw(st.sampled_from([1, 2, 5, 8]))
    budget = data.draw(st.integers(1, 12))
    sinks = data.draw(st.integers(0, min(3, budget)))
    config = CacheConfig(budget, buffer, 1, sinks=sinks, recent=data.draw(st.integers(0, min(2, budget - sinks))))
    stream = Stream(
        config, data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0, 4]))
    )
    total = data.draw(st.integers(0, budget + 6 * buffer))
    for count in chunks(total, lambda: config.slots - stream.cache.live, lambda most: data.draw(st.integers(1, most))):
        stream.feed(count)
        stream.check()
        stream.end_step()
        stream.check()


def test_a_long_stream_of_single_tokens_and_of_full_chunks_agree() -> None:
    config = CacheConfig(6, 4, 4)
    single, whole = (Stream(config, 2, 5) for _ in range(2))
    log_beta = -np.random.default_rng(1).exponential(0.2, (LAYERS, 2, 402, HEADS)).astype(np.float32)
    for stream, size in ((single, 1), (whole, 4)):
        while stream.seen < 402:
            count = min(size, config.slots - stream.cache.live, 402 - stream.seen)
            for layer in range(LAYERS):
                rows = np.stack([stream.rows(stream.seen + i, layer) for i in range(count)], axis=3)
                key, value = (torch.from_numpy(part) for part in rows)
                stream.cache.attend(layer, torch.zeros(2, HEADS, count, DIM), key, value, 1.0)
                stream.cache.retain(layer, torch.from_numpy(log_beta[layer, :, stream.seen : stream.seen + count]))
            stream.cache.advance(count)
            stream.seen += count
            if stream.cache.live == config.slots:
                stream.cache.evict()
    assert single.cache.live == whole.cache.live == 6 + (402 - 6) % 4
    live = single.cache.live
    assert torch.equal(single.cache.positions[..., :live], whole.cache.positions[..., :live])
    assert all(
        torch.equal(a[:, :, :live], b[:, :, :live]) for a, b in zip(single.cache.key, whole.cache.key, strict=True)
    )


@pytest.mark.parametrize("query_heads", [2, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_equals_float64_softmax(query_heads: int, batch: int) -> None:
    config = CacheConfig(7, 5, 5)
    stream = Stream(config, batch, 3, random_rows=True)
    for count in chunks(40, lambda: config.slots - stream.cache.live, lambda most: min(most, 3)):
        first = stream.seen
        for layer, (query, out) in enumerate(stream.feed(count, query_heads)):
            assert out.shape == (batch, count, query_heads, DIM)
            for sequence, i, head in np.ndindex(batch, count, query_heads):
                want = stream.oracles[sequence].attend(
                    layer, head // (query_heads // HEADS), query[sequence, head, i], 0.5, up_to=first + i
                )
                np.testing.assert_allclose(out[sequence, i, head].numpy(), want, atol=1e-5)
        stream.end_step()
    stream.check()


@pytest.mark.parametrize(("total", "live"), [(3, 3), (5, 5), (8, 5), (7, 7)])
def test_lengths_around_the_budget(total: int, live: int) -> None:
    stream = Stream(CacheConfig(5, 3, 3), 1, 0)
    for _ in range(total):
        stream.feed(1)
        stream.end_step()
    stream.check()
    assert stream.cache.live == live


def snapshot(cache: StaticCache) -> list[torch.Tensor]:
    counts = torch.tensor([cache.seen, cache.live])
    return [table.clone() for table in (*cache.key, *cache.value, cache.log_beta, cache.positions, counts)]


def test_overflow_and_early_eviction_change_nothing() -> None:
    stream = Stream(CacheConfig(4, 3, 3), 1, 0)
    stream.feed(5)
    before = snapshot(stream.cache)
    rows = torch.ones(1, HEADS, 3, DIM)
    with pytest.raises(StateError, match="3 tokens does not fit 2 free"):
        stream.cache.attend(0, rows, rows, rows, 1.0)
    with pytest.raises(StateError, match="7 entries are live, now 5"):
        stream.cache.evict()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(stream.cache), strict=True))
    stream.feed(2)
    stream.end_step()
    stream.check()


def test_reset_starts_a_new_stream() -> None:
    config = CacheConfig(4, 3, 3)
    stream = Stream(config, 1, 0)
    for _ in range(9):
        stream.feed(1)
        stream.end_step()
    stream.cache.reset()
    fresh = Stream(config, 1, 7)
    fresh.cache = stream.cache
    for _ in range(12):
        fresh.feed(1)
        fresh.end_step()
        fresh.check()


def test_half_precision_rows_keep_exact_scores() -> None:
    cache = StaticCache(CacheConfig(2, 2, 2), 1, 1, 2, dtype=torch.float16)
    rows = torch.arange(8, dtype=torch.float16).reshape(1, 1, 4, 2)
    cache.attend(0, rows, rows, rows, 1.0)
    cache.retain(0, torch.tensor([-1e-8, -3e-8, -1.0, -2e-9]).reshape(1, 4, 1))
    cache.advance(4)
    cache.evict()
    assert sorted(cache.positions[0, 0, 0, :2].tolist()) == [0, 3]
    assert cache.key[0].dtype == torch.float16
