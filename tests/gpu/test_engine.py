"""The torch engine keeps the same survivors in the same slots and gives the same tokens as the eager reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from factories import CONFIGS, gated_model, random_tokens
from failing_step import decode_and_fail
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.errors import ConfigError, PositionLimitError, StateError, TrimKVError
from trimkv_edge.gpu.engine import CompiledEngine
from trimkv_edge.gpu.placement import find_device, moved
from trimkv_edge.models.eager import EagerEngine

CONFIG = CacheConfig(budget=17, buffer=6, prefill_chunk=5)


@pytest.fixture(scope="module")
def compiled() -> Iterator[CompiledEngine]:
    """One engine for all tests of compiled graphs: compiling takes seconds."""
    torch._dynamo.reset()
    counters.clear()
    engine = CompiledEngine(gated_model("qwen3-gqa"), CONFIG)
    engine.warm_up()
    yield engine
    torch._dynamo.reset()


@pytest.fixture
def engine(compiled: CompiledEngine) -> CompiledEngine:
    compiled.reset()
    return compiled


def plain(case: str = "qwen3-gqa", config: CacheConfig = CONFIG, **settings: int) -> CompiledEngine:
    return CompiledEngine(gated_model(case), config, compiled=False, **settings)


def same_course(engine: Engine, reference: Engine, events: int, seed: int = 0) -> list[int]:
    """Drives both over chunks of random sizes and then greedy tokens; returns what was read."""
    rng = np.random.default_rng(seed)
    read, greedy, done = [], 0, 0
    while done < events:
        if reference.room == 0:
            reference.evict()
            engine.evict()
        most = min(reference.room, reference.config.prefill_chunk)
        size = 1 if done >= events // 2 else int(rng.integers(1, most + 1))
        ids = [greedy] if size == 1 and read else random_tokens(size, seed=len(read) + 1)
        read += ids
        want, got = reference.prefill(ids), engine.prefill(ids)
        assert np.abs(got - want).max() < 1e-4
        greedy = int(want.argmax())
        assert got.argmax() == greedy
        assert engine.room == reference.room
        if reference.room == 0:
            reference.evict()
            engine.evict()
            done += 1
        np.testing.assert_array_equal(engine.survivors(), reference.survivors())
    return read


def close(got: CacheState, want: CacheState) -> None:
    assert got.seen == want.seen
    np.testing.assert_array_equal(got.positions, want.positions)
    for name in ("key", "value", "log_beta"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, err_msg=name)


def heads_differ(engine: Engine) -> bool:
    kept = np.sort(engine.survivors()[..., : engine.config.budget], axis=-1)
    return bool((kept != kept[:1, :1]).any())


def test_compiled_graphs_follow_the_eager_engine_without_compiling_again(engine: CompiledEngine) -> None:
    reference = EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    before = counters["stats"]["unique_graphs"]
    assert before == 3
    same_course(engine, reference, events=12)
    close(engine.state(), reference.state())
    assert heads_differ(engine)
    engine.reset()
    reference.reset()
    same_course(engine, reference, events=2, seed=1)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("case", CONFIGS)
def test_every_family_follows_the_eager_engine(case: str) -> None:
    engine, reference = plain(case), EagerEngine(gated_model(case), CONFIG)
    same_course(engine, reference, events=6)
    close(engine.state(), reference.state())


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(17, 6, 5, sinks=3, recent=4),
        CacheConfig(17, 6, 5, lookahead=16),
        CacheConfig(17, 6, 5, policy="streaming", sinks=2),
        CacheConfig(17, 6, 5, policy="keydiff"),
        CacheConfig(17, 6, 5, policy="random"),
        CacheConfig(4, 1, 1),
        CacheConfig(5, 9, 1),
    ],
    ids=str,
)
def test_settings_and_policies_follow_the_eager_engine(config: CacheConfig) -> None:
    same_course(plain(config=config), EagerEngine(gated_model("qwen3-gqa"), config), events=8)


def test_chunks_of_any_size_leave_the_same_cache(engine: CompiledEngine) -> None:
    tokens, states = random_tokens(90, seed=7), []
    for size in (1, 2, 5):
        engine.reset()
        for start in range(0, 90, size):
            if engine.room == 0:
                engine.evict()
            ids = tokens[start : start + size]
            while ids:
                part, ids = ids[: engine.room], ids[engine.room :]
                engine.prefill(part)
                if ids:
                    engine.evict()
        states.append(engine.state())
    close(states[1], states[0])
    close(states[2], states[0])


@pytest.mark.parametrize("count", [3, 20, 23, 57])
def test_states_pass_between_engines(engine: CompiledEngine, count: int) -> None:
    reference = EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    for token in random_tokens(count, seed=2):
        if reference.room == 0:
            reference.evict()
        reference.decode(token)
    engine.load_state(reference.state())
    close(engine.state(), reference.state())
    same_course(engine, reference, events=3)
    other = EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    other.load_state(engine.state())
    same_course(engine, other, events=2)


def test_warming_up_leaves_the_stream_as_it_is() -> None:
    engine, reference = plain(), EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    same_course(engine, reference, events=3)
    engine.warm_up()
    close(engine.state(), reference.state())
    same_course(engine, reference, events=3)


def test_what_dead_slots_hold_does_not_matter() -> None:
    engine, reference = plain(), EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    for table in (engine.cache.key, engine.cache.value, engine.cache.log_beta):
        table.fill_(float("nan"))
    same_course(engine, reference, events=6)


def test_a_step_that_failed_is_repeated_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reference = plain(), EagerEngine(gated_model("qwen3-gqa"), CONFIG)
    same_course(engine, reference, events=2)
    decode_and_fail(engine, monkeypatch)
    same_course(engine, reference, events=2)


def test_the_compiled_step_writes_the_cache_where_it_lies() -> None:
    """A copy of a layer's keys and values for every token would cost as much as reading them again."""
    torch._dynamo.reset()
    config = CacheConfig(budget=111, buffer=20, prefill_chunk=1)
    engine = CompiledEngine(gated_model("qwen3-gqa"), config)
    _, code = run_and_get_code(engine.graphs.decode)
    made = [line for line in "\n".join(code).split("\n") if "empty_strided" in line and " = " in line]
    assert made
    assert not [line for line in made if "131" in line]


def test_a_compiler_that_is_not_there_is_told() -> None:
    engine = CompiledEngine(gated_model("qwen3-gqa"), CacheConfig(19, 3, 1))
    missing = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(missing), pytest.raises(TrimKVError, match=r"torch.compile failed .*g\+\+"):
        engine.warm_up()


def test_bf16_keeps_gates_and_rotary_frequencies_exact() -> None:
    model = gated_model("qwen3-gqa")
    half = moved(model, "cpu", torch.bfloat16)
    assert half.base.lm_head.weight.dtype is torch.bfloat16
    assert model.base.lm_head.weight.dtype is torch.float32
    assert {p.dtype for gate in half.gates for p in gate.parameters()} == {torch.float32}
    assert half.base.model.rotary_emb.inv_freq.dtype is torch.float32
    engine, reference = CompiledEngine(half, CONFIG, compiled=False), EagerEngine(model, CONFIG)
    assert engine.cache.key.dtype is torch.bfloat16
    assert engine.cache.log_beta.dtype is torch.float32
    tokens = random_tokens(5)
    want = reference.prefill(tokens)
    assert 0 < np.abs(engine.prefill(tokens) - want).max() < 0.1 * np.abs(want).max()


def test_the_contract_of_engines_holds() -> None:
    engine = plain(position_limit=30)
    with pytest.raises(StateError, match="1 to 5 fit"):
        engine.prefill([1] * 6)
    with pytest.raises(StateError, match="outside the vocabulary"):
        engine.prefill([99999])
    with pytest.raises(StateError, match="eviction runs when 23 entries"):
        engine.evict()
    for token in random_tokens(30):
        if engine.room == 0:
            engine.evict()
        engine.decode(token)
    with pytest.raises(PositionLimitError, match="position 30"):
        engine.decode(5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CacheConfig(16, 8, 8, policy="global"),
            "global has heads of different lengths, and this cache has none: use one of trimkv, ",
        ),
        (CacheConfig(16, 8, 8, policy="h2o"), "h2o never evicts or looks at attention"),
        (CacheConfig(16, 8, 8, policy="full"), "full never evicts"),
        (CacheConfig(16, 8, 8, kv_dtype="int8"), "not in int8: leave out --kv-dtype"),
    ],
)
def test_settings_that_it_cannot_honour_are_refused(config: CacheConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain(config=config)


@pytest.mark.parametrize(("name", "message"), [("gpu", "not known"), ("meta", "use cpu, cuda")])
def test_devices_that_are_none_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_no_fall_back() -> None:
    with pytest.raises(ConfigError, match=r"device cuda cannot be used: .*docs/gpu.md"):
        find_device("cuda")
    assert find_device().type == "cpu"
