"""The Engine contract where heads share a budget, on the eager engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from factories import gated_model
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState
from trimkv_edge.errors import StateError
from trimkv_edge.models.eager import EagerEngine, EagerPooledEngine, eager_engine

CONFIG = CacheConfig(6, 4, 3, "global")
TOKENS = np.random.default_rng(4).integers(3, 50, 60).tolist()
MODEL = gated_model("qwen3-gqa", "rg10")


def make(**more: object) -> EagerPooledEngine:
    engine = eager_engine(MODEL, replace(CONFIG, **more))  # type: ignore[arg-type]
    assert isinstance(engine, EagerPooledEngine)
    return engine


def feed(engine: EagerPooledEngine, tokens: list[int]) -> np.ndarray:
    logits = []
    for token in tokens:
        if engine.room == 0:
            engine.evict()
        logits.append(engine.decode(token))
    return np.array(logits)


def same(a: CacheState, b: CacheState) -> None:
    assert (a.seen, a.fill) == (b.seen, b.fill)
    for name in ("key", "value", "log_beta", "positions", "lengths"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("policy", ["global", "layer"])
def test_survivors_follow_the_oracle(policy: str) -> None:
    engine = make(policy=policy)
    layers, heads = engine.num_layers, engine.num_kv_heads
    oracle = OracleCache(layers, heads, CONFIG.budget, CONFIG.buffer, policy=policy)
    for seen, token in enumerate(TOKENS, start=1):
        engine.decode(token)
        state = engine.state()
        assert state.lengths is not None
        for layer, head in np.ndindex(layers, heads):
            newest = state.log_beta[layer, head, state.lengths[layer, head] - 1]
            oracle.append(layer, head, seen - 1, float(newest))
        check(engine, oracle)
        oracle.end_step(seen)
        if engine.room == 0:
            engine.evict()
            check(engine, oracle)
    assert oracle.events == (len(TOKENS) - CONFIG.budget) // CONFIG.buffer
    assert engine.kept.max() > CONFIG.budget


def check(engine: EagerPooledEngine, oracle: OracleCache) -> None:
    survivors = engine.survivors()
    lengths = (survivors >= 0).sum(-1)
    assert engine.entries == lengths.sum() == sum(len(held) for held in oracle.heads.values())
    for where in np.ndindex(lengths.shape):
        assert sorted(survivors[where][: lengths[where]].tolist()) == oracle.positions(*where)


@pytest.mark.parametrize(("moment", "evicted"), [(0, 0), (1, 0), (2, 0), (2, 1), (5, 0), (10, 0), (10, 1), (27, 0)])
def test_state_moves_between_engines_at_any_moment(moment: int, evicted: bool) -> None:
    first, second = make(), make()
    feed(second, TOKENS[:13])
    feed(first, TOKENS[:moment])
    if evicted:
        first.evict()
    state = first.state()
    second.load_state(state)
    assert (second.seen, second.room, second.entries) == (first.seen, first.room, first.entries)
    same(second.state(), state)
    np.testing.assert_allclose(feed(second, TOKENS[moment:]), feed(first, TOKENS[moment:]), atol=1e-5)
    assert np.array_equal(second.survivors(), first.survivors())
    first.reset()
    assert (first.seen, first.entries, first.room) == (0, 0, 2)


def test_states_of_another_cache_are_refused() -> None:
    engine = make()
    feed(engine, TOKENS[:29])
    state = engine.state()
    assert state.lengths is not None
    longest = np.unravel_index(state.lengths.argmax(), state.lengths.shape)

    def refused(match: str, **changed: object) -> None:
        with pytest.raises(StateError, match=match):
            engine.load_state(replace(state, **changed))  # type: ignore[arg-type]
        same(engine.state(), state)

    def other(change: Callable[[np.ndarray], None], of: np.ndarray) -> np.ndarray:
        copy = of.copy()
        change(copy)
        return copy

    refused("no lengths", lengths=None)
    refused("never happen", seen=state.seen + 1)
    refused("never happen", fill=5)
    refused("more entries", lengths=state.lengths + 40)
    refused("ring", positions=other(lambda p: p.__setitem__((0, 0, int(state.lengths[0, 0]) - 1), 3), state.positions))
    repeated = (*longest, 1), state.positions[(*longest, 0)]
    refused("kept positions", positions=other(lambda p: p.__setitem__(*repeated), state.positions))
    refused("does not fit", key=state.key[..., :1], value=state.value[..., :1])
    capped = make(caps=((7, 7), (7, 7)))
    with pytest.raises(StateError, match="more entries than these settings allow"):
        capped.load_state(state)
    per_head = EagerEngine(MODEL, CacheConfig(6, 4, 3))
    with pytest.raises(StateError, match="shared budget"):
        per_head.load_state(state)
