"""The host's cache: masks, rotary rows, what is written where, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from factories import CONFIGS, gated_model
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.host_cache import HostCache, Rotary, padded

CONFIG = CacheConfig(8, 4, 4)
LAYERS, HEADS, DIM = 2, 3, 5


def rows(positions: Sequence[int], padding: int = 0) -> np.ndarray:
    """Keys that say where they belong: ``[layers, kv_heads, padding + T, head_dim]``; padding is not a number."""
    table = np.full((LAYERS, HEADS, padding + len(positions), DIM), np.nan, np.float32)
    for layer, head in np.ndindex(LAYERS, HEADS):
        for index, position in enumerate(positions):
            table[layer, head, padding + index] = [position, layer, head, 1, -1]
    return table


def write(cache: HostCache, logits: np.ndarray, padding: int = 0) -> None:
    """Appends one chunk; ``logits [layers, T, kv_heads]``."""
    count = logits.shape[1]
    new = rows(range(cache.seen, cache.seen + count), padding)
    noise = np.full((LAYERS, padding, HEADS), 99.0, np.float32)
    cache.append(new, 2 * new, np.concatenate([noise, logits], axis=1).astype(np.float32), count)


@pytest.mark.parametrize("padding", [0, 3])
def test_rows_follow_their_positions_through_events(padding: int) -> None:
    random = np.random.default_rng(0)
    cache, oracle = HostCache(CONFIG, LAYERS, HEADS, DIM), OracleCache(LAYERS, HEADS, 8, 4)
    while cache.seen < 60:
        count = min(int(random.integers(1, 5)), cache.room)
        logits = random.normal(3, 2, (LAYERS, count, HEADS)).astype(np.float32)
        for index, layer, head in np.ndindex(count, LAYERS, HEADS):
            beta = np.float32(-np.logaddexp(0, -np.float64(logits[layer, index, head])))
            oracle.append(layer, head, cache.seen + index, float(beta))
        write(cache, logits, padding)
        ran = oracle.end_step(cache.seen)
        assert ran == (cache.room == 0)
        if ran:
            assert 0 < cache.evict() <= 4 * LAYERS * HEADS
        live = cache.live
        for layer, head in np.ndindex(LAYERS, HEADS):
            entries = oracle.entries(layer, head)
            order = np.argsort(cache.positions[layer, head, :live])
            assert cache.positions[layer, head, :live][order].tolist() == [entry.position for entry in entries]
            want = [entry.log_beta for entry in entries]
            np.testing.assert_allclose(cache.log_beta[layer, head, :live][order], want, rtol=1e-6)
            np.testing.assert_array_equal(cache.key[layer, head, :live, 0], cache.positions[layer, head, :live])
            assert (cache.key[layer, head, :live, 1:] == [layer, head, 1, -1]).all()
        np.testing.assert_array_equal(cache.value[:, :, :live], 2 * cache.key[:, :, :live])
    assert oracle.events >= 10


def test_a_mask_hides_padding_dead_slots_and_the_future() -> None:
    cache = HostCache(CONFIG, LAYERS, HEADS, DIM, masked=-30)
    write(cache, np.zeros((LAYERS, 2, HEADS)))
    m, o = -30, 0
    want = [
        [m, m, m, m, m, m, m, m, m, m, m, m, m, m, m],
        [o, o, m, m, m, m, m, m, m, m, m, m, m, o, m],
        [o, o, m, m, m, m, m, m, m, m, m, m, m, o, o],
    ]
    mask = cache.mask(2, 3)
    assert mask.shape == (1, 1, 3, 15)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask[0, 0], want)
    np.testing.assert_array_equal(cache.mask(1, 1)[0, 0], [[o, o, *[m] * 10, o]])


def test_padding_repeats_the_first_token() -> None:
    assert padded(3, 5).tolist() == [0, 0, 0, 1, 2]
    assert padded(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert padded(1, 1).tolist() == [0]


@pytest.mark.parametrize("case", [*CONFIGS, "phi3-longrope short"])
def test_rotary_rows_are_the_models(case: str) -> None:
    name, _, variant = case.partition(" ")
    embedding = gated_model(name, rope=variant or "auto").base.model.rotary_emb
    rotary = Rotary(embedding.inv_freq.numpy(), embedding.attention_scaling)
    positions = np.array([0, 1, 2, 77, 2049, 99_999, 2**20 + 3, 2**23 + 1, 2**24 - 1])
    want = embedding(torch.zeros(1), torch.from_numpy(positions)[None])
    for mine, theirs in zip(rotary.rows(positions), want, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs.numpy(), atol=3e-7)


@pytest.mark.parametrize(("count", "chunk"), [(0, 4), (5, 4), (4, 2), (4, 8)])
def test_chunks_that_do_not_fit_are_refused(count: int, chunk: int) -> None:
    cache = HostCache(CONFIG, LAYERS, HEADS, DIM)
    for _ in range(3):
        write(cache, np.zeros((LAYERS, 3, HEADS)))
    with pytest.raises(StateError, match=rf"{count} tokens given, but 1 to {min(chunk, 3)} fit now: split the chunk"):
        cache.mask(count, chunk)
    with pytest.raises(StateError, match="fit now"):
        cache.append(rows(range(chunk)), rows(range(chunk)), None, count)
    assert (cache.seen, cache.live) == (9, 9)


def test_events_run_when_they_are_due() -> None:
    cache = HostCache(CONFIG, LAYERS, HEADS, DIM)
    with pytest.raises(StateError, match="eviction runs when 12 entries are live, now 0 are"):
        cache.evict()
    for _ in range(3):
        write(cache, np.zeros((LAYERS, 4, HEADS)))
    with pytest.raises(StateError, match="evict first"):
        cache.mask(1, 1)


def test_nothing_is_written_where_the_graph_failed() -> None:
    cache = HostCache(CONFIG, LAYERS, HEADS, DIM)
    bad = np.zeros((LAYERS, 2, HEADS), np.float32)
    bad[1, 1, 2] = np.nan
    with pytest.raises(StateError, match="NaN"):
        cache.append(rows([0, 1]), rows([0, 1]), bad, 2)
    with pytest.raises(StateError, match="rows of float16 and float32 given, but the cache stores float32"):
        cache.append(rows([0, 1]).astype(np.float16), rows([0, 1]), None, 2)
    assert (cache.seen, cache.live) == (0, 0)
    assert not cache.key.any()


def test_quantised_rows_are_stored_as_they_come() -> None:
    cache = HostCache(CacheConfig(2, 1, 1), 1, 1, 2, dtype=np.uint8)
    for position, logit in enumerate([9.0, -9.0, 9.0]):
        row = np.array([[[[position, 255]]]], np.uint8)
        cache.append(row, row, np.full((1, 1, 1), logit, np.float32), 1)
    assert cache.evict() == 1
    assert cache.key[0, 0, :2].tolist() == [[0, 255], [2, 255]]


def test_without_gates_every_log_beta_is_zero() -> None:
    cache = HostCache(CacheConfig(3, 1, 1, policy="streaming"), LAYERS, HEADS, DIM)
    cache.log_beta.fill(7)
    for position in range(4):
        cache.append(rows([position]), rows([position]), None, 1)
    cache.evict()
    assert not cache.log_beta[..., :3].any()
    assert np.sort(cache.positions[..., :3], -1).reshape(-1, 3).tolist() == [[1, 2, 3]] * (LAYERS * HEADS)


def test_reset_begins_anew() -> None:
    cache, fresh = (HostCache(CONFIG, LAYERS, HEADS, DIM) for _ in range(2))
    for _ in range(3):
        write(cache, np.random.default_rng(1).normal(size=(LAYERS, 4, HEADS)))
    cache.evict()
    cache.reset()
    for name in ("key", "value", "log_beta", "positions"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(fresh, name))
    assert (cache.seen, cache.live, cache.room) == (0, 0, 12)


def test_shared_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="a budget that heads share, which a host-evicted graph does not have yet"):
        HostCache(CacheConfig(8, 4, 4, policy="global", caps=((8, 8),)), 1, 2, DIM)
