"""The Engine contract on an engine of lists and on the eager torch engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.errors import PositionLimitError, StateError

CONFIG = CacheConfig(6, 4, 3)  # what `make` of conftest.py uses unless told otherwise
Make = Callable[..., Engine]
TOKENS = np.random.default_rng(4).integers(3, 50, 60).tolist()


def feed(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Token by token, evicting when due; returns all logits."""
    logits = []
    for token in tokens:
        if engine.room == 0:
            engine.evict()
        logits.append(engine.decode(token))
    return np.array(logits)


def same(a: CacheState, b: CacheState) -> None:
    assert a.seen == b.seen
    for name in ("key", "value", "log_beta", "positions"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right), name


@pytest.mark.parametrize(
    ("moment", "evicted"),
    [(0, False), (1, False), (6, False), (8, False), (10, False), (10, True), (12, False), (14, True), (27, False)],
)
def test_state_moves_between_engines_at_any_moment(make: Make, moment: int, evicted: bool) -> None:
    first, second = make(), make()
    feed(second, TOKENS[:13])
    feed(first, TOKENS[:moment])
    if evicted and first.room == 0:
        first.evict()
    state = first.state()
    second.load_state(state)
    assert (second.seen, second.live, second.room) == (first.seen, first.live, first.room)
    same(second.state(), state)
    np.testing.assert_array_equal(feed(second, TOKENS[moment:]), feed(first, TOKENS[moment:]))
    same(second.state(), first.state())


def test_state_is_a_copy(make: Make) -> None:
    engine = make()
    feed(engine, TOKENS[:8])
    state = engine.state()
    kept = CacheState(state.seen, *(getattr(state, n).copy() for n in ("key", "value", "log_beta", "positions")))
    feed(engine, TOKENS[8:30])
    same(state, kept)
    engine.load_state(state)
    state.key[:] = 7
    state.positions[:] = 0
    same(engine.state(), kept)


def test_survivors_follow_the_oracle(make: Make) -> None:
    engine = make()
    oracle = OracleCache(engine.num_layers, engine.num_kv_heads, CONFIG.budget, CONFIG.buffer)
    for seen, token in enumerate(TOKENS, start=1):
        engine.decode(token)
        newest = engine.state().log_beta[:, :, -1]
        for layer, head in np.ndindex(newest.shape):
            oracle.append(layer, head, seen - 1, float(newest[layer, head]))
        check_survivors(engine, oracle)
        if engine.room == 0:
            engine.evict()
            check_survivors(engine, oracle, oracle.end_step(seen))
    assert oracle.events == (len(TOKENS) - CONFIG.budget) // CONFIG.buffer


def check_survivors(engine: Engine, oracle: OracleCache, event: bool = False) -> None:
    survivors = engine.survivors()
    assert survivors.dtype == np.int64
    assert survivors.shape == (engine.num_layers, engine.num_kv_heads, engine.live)
    assert engine.live == (CONFIG.budget if event else len(oracle.positions(0, 0)))
    for layer, head in np.ndindex(survivors.shape[:2]):
        assert sorted(survivors[layer, head].tolist()) == oracle.positions(layer, head)


def test_chunks_give_what_single_tokens_give(make: Make) -> None:
    single, chunked = make(), make()
    logits = feed(single, TOKENS)
    rng, done = np.random.default_rng(0), 0
    while done < len(TOKENS):
        if chunked.room == 0:
            chunked.evict()
        most = min(chunked.room, CONFIG.prefill_chunk, len(TOKENS) - done)
        count = int(rng.integers(1, most + 1))
        got = chunked.prefill(TOKENS[done : done + count])
        done += count
        np.testing.assert_allclose(got, logits[done - 1], atol=2e-4)
        assert got.shape == (chunked.vocab_size,)
    assert np.array_equal(np.sort(single.survivors()), np.sort(chunked.survivors()))


def refused(engine: Engine, error: type[Exception], match: str, call: Callable[[], object]) -> None:
    before = engine.state()
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    same(engine.state(), before)


@pytest.mark.parametrize("moment", [0, 4, 10, 13])
def test_refused_calls_change_nothing(make: Make, moment: int) -> None:
    engine, twin = make(), make()
    feed(engine, TOKENS[:moment])
    feed(twin, TOKENS[:moment])
    vocab = engine.vocab_size
    if engine.room:
        refused(engine, StateError, "outside the vocabulary", lambda: engine.decode(vocab))
        refused(engine, StateError, "token id -1 is outside", lambda: engine.prefill([-1]))
        refused(engine, StateError, f"10 entries are live, now {engine.live}", engine.evict)
    else:
        refused(engine, StateError, r"call evict\(\) first", lambda: engine.decode(3))
    refused(engine, StateError, "0 tokens given", lambda: engine.prefill([]))
    refused(engine, StateError, "split the chunk|call evict", lambda: engine.prefill([3] * 4))
    np.testing.assert_array_equal(feed(engine, TOKENS[moment:30]), feed(twin, TOKENS[moment:30]))


def test_position_limit(make: Make) -> None:
    engine = make(position_limit=12)
    feed(engine, TOKENS[:11])
    refused(engine, PositionLimitError, r"position 12 .*\(11\).*reset", lambda: engine.prefill([3, 4]))
    engine.decode(3)
    refused(engine, PositionLimitError, "position 12", lambda: engine.decode(3))
    engine.reset()
    assert (engine.seen, engine.live) == (0, 0)
    np.testing.assert_array_equal(feed(engine, TOKENS[:12]), feed(make(), TOKENS[:12]))


def test_a_stream_may_end_at_the_last_exact_float32_position(make: Make) -> None:
    engine = make()
    feed(engine, TOKENS[:7])  # a multiple of the buffer away from 2**24 - 1
    state = engine.state()
    ahead = 2**24 - 1 - state.seen
    engine.load_state(replace(state, seen=state.seen + ahead, positions=state.positions + ahead))
    engine.decode(3)
    assert engine.survivors().max() == 2**24 - 1
    refused(engine, PositionLimitError, "16777216.*16777215", lambda: engine.decode(3))


def test_states_of_another_cache_are_refused(make: Make) -> None:
    engine = make()
    feed(engine, TOKENS[:12])
    state = engine.state()
    rows = (engine.num_layers, engine.num_kv_heads)
    fields = {name: getattr(state, name) for name in ("key", "value", "log_beta", "positions")}

    def load(seen: int = state.seen, **changed: np.ndarray) -> Callable[[], None]:
        return lambda: engine.load_state(CacheState(seen, **{**fields, **changed}))

    def cut(axis: int, size: int) -> dict[str, np.ndarray]:
        return {n: np.take(a, range(size), axis) for n, a in fields.items() if a.ndim > axis}

    refused(engine, StateError, "does not fit this cache", load(**cut(0, 1)))
    refused(engine, StateError, "does not fit this cache", load(**cut(1, 1)))
    refused(engine, StateError, "does not fit this cache", load(**cut(3, 2)))
    refused(engine, StateError, "state shapes differ", load(value=fields["value"][..., :1]))
    refused(engine, StateError, "state shapes differ", load(positions=fields["positions"][:1]))
    double = {name: np.concatenate([array, array], axis=2) for name, array in fields.items()}
    refused(engine, StateError, "does not fit this cache", load(seen=100, **double))
    refused(engine, StateError, "ring", load(seen=state.seen + 1))
    refused(engine, StateError, "fit this cache", load(seen=state.live - 1))
    swapped = fields["positions"].copy()
    swapped[..., -1], swapped[..., -2] = fields["positions"][..., -2], fields["positions"][..., -1]
    refused(engine, StateError, "ring", load(positions=swapped))
    # After the first event a head never holds fewer than the budget.
    refused(engine, StateError, "budget", load(**cut(2, CONFIG.budget - 1)))
    empty = {"key": np.zeros((*rows, 0, engine.head_dim), np.float32)}
    empty |= {"value": empty["key"], "log_beta": np.zeros((*rows, 0), np.float32)}
    refused(engine, StateError, "budget", load(**empty, positions=np.zeros((*rows, 0), np.int64)))
    for slot, position in ((0, -1), (0, state.seen), (0, state.seen - 1), (1, int(fields["positions"][0, 0, 0]))):
        wrong = fields["positions"].copy()
        wrong[0, 0, slot] = position
        refused(engine, StateError, "kept positions", load(positions=wrong))
    early = make()
    feed(early, TOKENS[:4])
    wrong = early.state().positions[..., ::-1]
    refused(engine, StateError, "ring", lambda: engine.load_state(replace(early.state(), positions=wrong)))
