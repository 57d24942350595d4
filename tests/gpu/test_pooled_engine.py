"""The torch engine over a shared budget keeps what the eager reference keeps, in the same slots."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from factories import gated_model, random_tokens
from failing_step import decode_and_fail
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState
from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.gpu.placement import moved
from trimkv_edge.gpu.pooled_engine import CompiledPooledEngine
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.pooled_engine import PooledEngine

GLOBAL = CacheConfig(budget=17, buffer=6, prefill_chunk=5, policy="global")


@pytest.fixture(scope="module")
def compiled() -> Iterator[CompiledPooledEngine]:
    torch._dynamo.reset()
    counters.clear()
    engine = CompiledPooledEngine(gated_model("qwen3-gqa", "rg10"), GLOBAL)
    engine.warm_up()
    yield engine
    torch._dynamo.reset()


@pytest.fixture
def engine(compiled: CompiledPooledEngine) -> CompiledPooledEngine:
    compiled.reset()
    return compiled


def eager(config: CacheConfig = GLOBAL) -> PooledEngine:
    made = eager_engine(gated_model("qwen3-gqa", "rg10"), config)
    assert isinstance(made, PooledEngine)
    return made


def plain(config: CacheConfig = GLOBAL) -> CompiledPooledEngine:
    return CompiledPooledEngine(gated_model("qwen3-gqa", "rg10"), config, compiled=False)


def same_course(engine: PooledEngine, reference: PooledEngine, events: int, seed: int = 0) -> None:
    """Chunks of random sizes, then greedy tokens."""
    rng = np.random.default_rng(seed)
    greedy, done = 0, 0
    while done < events:
        if reference.room == 0:
            reference.evict()
            engine.evict()
            done += 1
            np.testing.assert_array_equal(engine.kept, reference.kept)
        most = min(reference.room, reference.config.prefill_chunk)
        size = 1 if done >= events // 2 else int(rng.integers(1, most + 1))
        ids = [greedy] if size == 1 and reference.seen else random_tokens(size, seed=reference.seen + 1)
        want, got = reference.prefill(ids), engine.prefill(ids)
        assert np.abs(got - want).max() < 1e-4
        greedy = int(want.argmax())
        assert got.argmax() == greedy
        np.testing.assert_array_equal(engine.survivors(), reference.survivors())


def close(got: CacheState, want: CacheState) -> None:
    assert (got.seen, got.fill) == (want.seen, want.fill)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_array_equal(got.positions, want.positions)
    for name in ("key", "value", "log_beta"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, err_msg=name)


def test_compiled_graphs_follow_the_eager_engine_without_compiling_again(engine: CompiledPooledEngine) -> None:
    reference = eager()
    before = counters["stats"]["unique_graphs"]
    assert before == 2
    same_course(engine, reference, events=12)
    close(engine.state(), reference.state())
    assert len(set(engine.kept.flatten().tolist())) > 1  # heads of different lengths
    engine.reset()
    reference.reset()
    same_course(engine, reference, events=3, seed=1)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(17, 6, 5, policy="layer"),
        CacheConfig(17, 6, 5, policy="global", min_per_head=4, sinks=2, recent=3),
        CacheConfig(17, 6, 5, policy="global", threshold=0.2),
        CacheConfig(17, 6, 5, policy="global", caps=((20, 30), (17, 23))),
        CacheConfig(5, 9, 1, policy="global"),
    ],
    ids=str,
)
def test_settings_follow_the_eager_engine(config: CacheConfig) -> None:
    engine, reference = plain(config), eager(config)
    same_course(engine, reference, events=9)
    close(engine.state(), reference.state())


@pytest.mark.parametrize("count", [4, 23, 61])
def test_states_pass_between_engines(engine: CompiledPooledEngine, count: int) -> None:
    reference = eager()
    for token in random_tokens(count, seed=2):
        if reference.room == 0:
            reference.evict()
        reference.decode(token)
    engine.load_state(reference.state())
    close(engine.state(), reference.state())
    same_course(engine, reference, events=3)
    other = eager()
    other.load_state(engine.state())
    same_course(engine, other, events=3)


def test_what_dead_slots_hold_does_not_matter() -> None:
    engine, reference = plain(), eager()
    for table in (engine.pool.key, engine.pool.value, engine.pool.log_beta):
        table.fill_(float("nan"))
    same_course(engine, reference, events=8)


def test_a_step_that_failed_is_repeated_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reference = plain(), eager()
    same_course(engine, reference, events=4)
    decode_and_fail(engine, monkeypatch)
    same_course(engine, reference, events=3)


def test_the_compiled_step_writes_the_pool_where_it_lies() -> None:
    torch._dynamo.reset()
    engine = CompiledPooledEngine(gated_model("qwen3-gqa", "rg10"), CacheConfig(111, 20, 1, policy="global"))
    entries = engine.pool.key.shape[0]
    assert entries == 2 * 2 * 131
    _, code = run_and_get_code(engine.graphs.decode)
    made = [line for line in "\n".join(code).split("\n") if "empty_strided" in line and " = " in line]
    assert made
    assert not [line for line in made if str(entries) in line]


def test_bf16_and_refusals() -> None:
    half = CompiledPooledEngine(moved(gated_model("qwen3-gqa", "rg10"), "cpu", torch.bfloat16), GLOBAL, compiled=False)
    assert half.pool.key.dtype is torch.bfloat16
    assert half.pool.log_beta.dtype is torch.float32
    want = eager().prefill(random_tokens(4))
    assert 0 < np.abs(half.prefill(random_tokens(4)) - want).max() < 0.1 * np.abs(want).max()
    with pytest.raises(StateError, match="eviction runs when the ring is full"):
        half.evict()
    with pytest.raises(ConfigError, match="no int8 keys and values"):
        plain(CacheConfig(17, 6, 5, policy="global", kv_dtype="int8"))
    with pytest.raises(ConfigError, match="the caps are for 1 layers"):
        plain(CacheConfig(17, 6, 5, policy="global", caps=((20, 30),)))
