"""The ExecuTorch target against the eager engine: same survivors, slots and greedy tokens; state; graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import _C
from executorch_artefact import ExecuTorchArtefact, make_executorch
from factories import gated_model, random_tokens
from onnx_artefact import feed, same, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.executorch import PROGRAM, export_executorch, partitioners
from trimkv_edge.export.executorch_check import operators, portable_kernels
from trimkv_edge.retention import log_sigmoid

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=6)
CASES = {
    "xnnpack": ("qwen3-gqa", "rg", "xnnpack", CONFIG),
    "protected": ("llama-gqa", "rg10", "xnnpack", replace(CONFIG, sinks=2, recent=5)),
    "single": ("phi3-mha", "rg10", "xnnpack", CacheConfig(budget=12, buffer=1, prefill_chunk=1)),
    "portable": ("phi3-mha", "rg", "portable", CONFIG),
}
SIZES = (6, 3, 1, 1, 5, 6, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExecuTorchArtefact]:
    """Artefacts by case, each exported when a test first asks for it."""
    root = tmp_path_factory.mktemp("executorch")

    class Store(dict[str, ExecuTorchArtefact]):
        def __missing__(self, case: str) -> ExecuTorchArtefact:
            family, gate, ops, config = CASES[case]
            self[case] = make_executorch(root / case, spread_gates(gated_model(family, gate)), config, ops)
            return self[case]

    return Store()


@pytest.fixture(params=["xnnpack", "portable"])
def artefact(request: pytest.FixtureRequest, made: dict[str, ExecuTorchArtefact]) -> ExecuTorchArtefact:
    """One case of each operator set."""
    return made[request.param]


@pytest.mark.parametrize("case", CASES)
def test_same_survivors_tokens_and_logits(made: dict[str, ExecuTorchArtefact], case: str) -> None:
    eager, exported = made[case].eager(), made[case].engine()
    config = eager.config
    tokens = random_tokens(config.budget + config.buffer * 9 + 5)
    start, events = 0, 0
    while start < len(tokens):
        if eager.room == 0:
            eager.evict()
            exported.evict()
            events += 1
            np.testing.assert_array_equal(eager.survivors(), exported.survivors())
        count = min(SIZES[start % len(SIZES)], eager.room, len(tokens) - start, config.prefill_chunk)
        want, got = (engine.prefill(tokens[start : start + count]) for engine in (eager, exported))
        assert np.abs(want - got).max() <= 1e-4
        assert want.argmax() == got.argmax()
        start += count
    assert events >= 5
    kept = exported.survivors()
    assert len({tuple(sorted(row)) for row in kept.reshape(-1, kept.shape[-1])}) > 1, "the heads' choices do not differ"
    np.testing.assert_allclose(eager.state().log_beta, exported.state().log_beta, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(eager.state().key, exported.state().key, atol=1e-5)


def test_protection_holds(made: dict[str, ExecuTorchArtefact]) -> None:
    engine = made["protected"].engine()
    feed(engine, random_tokens(24 + 8 * 6), (6,))
    engine.evict()
    must = {0, 1, *range(engine.seen - 5, engine.seen)}
    assert all(must <= set(row) for row in engine.survivors().reshape(4, -1).tolist())


def test_reset_replays_bit_identically(artefact: ExecuTorchArtefact) -> None:
    engine = artefact.engine()
    first, kept = feed(engine, random_tokens(90), SIZES), engine.survivors()
    engine.reset()
    assert (engine.seen, engine.live) == (0, 0)
    assert same(first, feed(engine, random_tokens(90), SIZES))
    np.testing.assert_array_equal(kept, engine.survivors())


def test_reset_needs_no_zeroed_memory(artefact: ExecuTorchArtefact) -> None:
    """A runtime may hand out arenas with anything in them, even NaN."""
    engine = artefact.engine()
    clean = feed(engine, random_tokens(60), SIZES)
    poison = [np.full_like(array, np.nan) for array in engine._read()]
    engine._write(*poison, engine._kept_positions() * 0 - 7, 0, engine.config.slots)
    assert all(np.isnan(array).all() for array in engine._read())
    engine.reset()
    assert same(clean, feed(engine, random_tokens(60), SIZES))


@pytest.mark.parametrize("early", [20, 90], ids=["before-the-first-event", "after-events"])
def test_state_moves_between_engines(artefact: ExecuTorchArtefact, early: int) -> None:
    tokens = random_tokens(early + 60)
    straight, eager, exported = artefact.eager(), artefact.eager(), artefact.engine()
    feed(straight, tokens, (1,))
    feed(eager, tokens[:early], (5,))
    feed(exported, random_tokens(77, seed=1), (6,))  # leftovers of another stream must not matter
    exported.load_state(eager.state())
    assert_equal_states(exported.state(), eager.state())
    feed(exported, tokens[early : early + 30], (3,))
    eager.reset()
    eager.load_state(exported.state())
    feed(eager, tokens[early + 30 :], (4,))
    np.testing.assert_array_equal(straight.survivors(), eager.survivors())
    np.testing.assert_allclose(straight.state().value, eager.state().value, atol=1e-5)


def test_reading_state_changes_nothing(artefact: ExecuTorchArtefact) -> None:
    """All methods share one activation arena and the buffers (pitfall P2)."""
    plain, watched = artefact.engine(), artefact.engine()
    want, got = [], []
    for token in random_tokens(70):
        for engine, out in ((plain, want), (watched, got)):
            if engine.room == 0:
                engine.evict()
            out.append(engine.decode(token))
        watched.state()
        watched.load_state(watched.state())
    assert same(want, got)


def test_loading_a_method_later_keeps_the_buffers(artefact: ExecuTorchArtefact) -> None:
    """Pitfall P2: true as long as no method carries initial values for a buffer."""
    engine, late = artefact.engine(), artefact.engine()
    tokens = random_tokens(60)
    program = late._binding._load_program(str(artefact.folder / PROGRAM))
    late._methods = {name: program.load_method(name) for name in ("forward", "gates", "evict", "reset")}
    late.reset()
    late._program = program
    for each in (engine, late):
        feed(each, tokens, SIZES)
    late._methods |= {name: program.load_method(name) for name in ("read_state", "read_kept")}
    assert_equal_states(engine.state(), late.state())


def at_event(engine: Engine, log_beta: np.ndarray) -> CacheState:  # type: ignore[type-arg]
    """A full cache whose log-betas are as given, ``[slots]`` or a number."""
    feed(engine, random_tokens(24 + 8 + 8), (6,))
    state = engine.state()
    return replace(state, log_beta=np.broadcast_to(np.float32(log_beta), state.log_beta.shape).copy())


@pytest.mark.parametrize("log_beta", [0.0, -1e-38, -0.25])
def test_equal_log_betas_the_oldest_leave_first(artefact: ExecuTorchArtefact, log_beta: float) -> None:
    """Scores are all equal for the first; the second has denormal, colliding scores."""
    engine = artefact.engine()
    state = at_event(artefact.eager(), np.array(log_beta))
    engine.load_state(state)
    engine.evict()
    oldest_left = np.sort(state.positions, axis=-1)[..., 8:]
    np.testing.assert_array_equal(np.sort(engine.survivors(), axis=-1), oldest_left)


def test_exact_ties_across_ages(artefact: ExecuTorchArtefact) -> None:
    """log_beta = -64/age, exact in float32 for powers of two: entries of different age share one score."""
    eager, engine = artefact.eager(), artefact.engine()
    state = at_event(eager, np.array(0.0))
    age = state.seen + 1 - state.positions
    state = replace(state, log_beta=(-64.0 / (2 ** np.floor(np.log2(age)))).astype(np.float32))
    for each in (eager, engine):
        each.load_state(state)
        each.evict()
    np.testing.assert_array_equal(eager.survivors(), engine.survivors())


def test_far_positions(artefact: ExecuTorchArtefact) -> None:
    eager, engine = artefact.eager(), artefact.engine()
    feed(eager, random_tokens(60), (6,))
    state = eager.state()
    shift = 9_999_000
    state = replace(state, seen=state.seen + shift, positions=state.positions + shift)
    for each in (eager, engine):
        each.load_state(state)
    want, got = (feed(each, random_tokens(20, seed=2), SIZES) for each in (eager, engine))
    assert max(np.abs(a - b).max() for a, b in zip(want, got, strict=True)) <= 1e-4
    np.testing.assert_array_equal(eager.survivors(), engine.survivors())


class _LogSigmoid(torch.nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return log_sigmoid(z)


@pytest.mark.parametrize("ops", ["xnnpack", "portable"])
def test_log_sigmoid_keeps_its_accuracy(ops: str) -> None:
    """As lowered: trained gates start near z = 18, where log(sigmoid(z)) would be 0; far below 0 nothing overflows."""
    z = torch.cat([torch.linspace(-100, 100, 2001), torch.linspace(15, 30, 301)])
    exported = torch.export.export(_LogSigmoid(), (z,))
    program = to_edge_transform_and_lower(exported, partitioner=partitioners(ops)).to_executorch()
    got = _C._load_program_from_buffer(program.buffer).load_method("forward").call((z,))[0].double()
    want = torch.nn.functional.logsigmoid(z.double())
    # Below float32's smallest normal number the vectorised exp of some kernels gives 0.
    normal = want.abs() > 1.2e-38
    assert ((got - want).abs() / want.abs())[normal].max() <= 4e-7
    assert got[~normal].abs().max() <= 1.2e-38
    ordered = got[2001:]
    assert (ordered.diff() > 0).all(), "the ranking of long-lived entries is lost"


def test_forward_does_not_copy_the_cache(made: dict[str, ExecuTorchArtefact]) -> None:
    made_one = made["xnnpack"]
    counts = operators(made_one.program)["forward"]
    assert counts["llama::custom_sdpa.out"] == 2
    assert counts["llama::update_cache.out"] == 4
    assert not [name for name in counts if name.startswith(("aten::copy", "aten::index_put", "aten::clone"))]
    graph = made_one.program.exported_program("forward").graph_module
    whole = 2 * 32 * made_one.model.head_dim
    for node in graph.graph.nodes:
        specs = node.meta.get("spec")
        for spec in specs if isinstance(specs, list | tuple) else [specs]:
            if spec is not None and np.prod(spec.shape) == whole and {32, 64} & set(spec.shape):
                assert spec.mem_id == 2, f"{node.name} is a copy of a cache table"


def test_only_the_chunk_length_is_dynamic(made: dict[str, ExecuTorchArtefact]) -> None:
    for case, chunk in (("xnnpack", 6), ("single", 1)):
        metadata = made[case].engine()._program.method_meta("forward")
        assert [metadata.input_tensor_meta(i).sizes() for i in range(metadata.num_inputs())] == [(1, chunk), (1,), (1,)]
        outputs = [metadata.output_tensor_meta(i).sizes() for i in range(metadata.num_outputs())]
        assert outputs == [(1, 1, 320), (1, chunk, 64), (1, chunk, 64)]
        placeholders = made[case].program.exported_program("forward").graph_module.graph.find_nodes(op="placeholder")
        moving = [node.name for node in placeholders if node.meta["spec"].is_dynamic_shape_tensor]
        assert moving == (["input_ids"] if chunk > 1 else [])
        placeholders = made[case].program.exported_program("gates").graph_module.graph.find_nodes(op="placeholder")
        moving = [node.name for node in placeholders if node.meta["spec"].is_dynamic_shape_tensor]
        assert moving == (["rows_0", "rows_1"] if chunk > 1 else [])
    for method in ("evict", "reset", "read_state", "write_state"):
        graph = made["xnnpack"].program.exported_program(method).graph_module.graph
        specs = [node.meta.get("spec") for node in graph.nodes]
        assert not any(getattr(spec, "is_dynamic_shape_tensor", False) for spec in specs)


def test_portable_needs_portable_kernels_only(made: dict[str, ExecuTorchArtefact]) -> None:
    names = {name for counts in operators(made["portable"].program).values() for name in counts}
    assert not [name for name in names if name.startswith("llama::")]
    others = {name for name in names if name.startswith("aten::")} - portable_kernels()
    assert others <= {"aten::sym_size.int", "aten::_local_scalar_dense"}
    assert not any(counts["delegate"] for counts in operators(made["portable"].program).values())


def test_metadata_methods(made: dict[str, ExecuTorchArtefact]) -> None:
    program = made["xnnpack"].engine()._program
    value = {
        name: program.load_method(name).call(())
        for name in ("get_vocab_size", "get_eos_ids", "get_trimkv_budget", "get_trimkv_buffer", "get_max_seq_len")
    }
    assert value == {
        "get_vocab_size": [320],
        "get_eos_ids": [2, 3],
        "get_trimkv_budget": [24],
        "get_trimkv_buffer": [8],
        "get_max_seq_len": [6],
    }


def test_nothing_local_is_left_in_the_file(artefact: ExecuTorchArtefact) -> None:
    assert b".py" not in (artefact.folder / PROGRAM).read_bytes()


def test_export_rejects_what_it_cannot_do(tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    with pytest.raises(ConfigError, match="'fancy' are not known; use one of xnnpack, portable"):
        export_executorch(model, CONFIG, tmp_path, ops="fancy")
    with pytest.raises(ConfigError, match="lookahead is 4"):
        export_executorch(model, replace(CONFIG, lookahead=4), tmp_path)
    assert not list(tmp_path.iterdir())


def assert_equal_states(one: CacheState, other: CacheState) -> None:
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        np.testing.assert_array_equal(a, b)
