"""Host-evicted graphs: what is in them, and that with the numpy host they are the eager model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import CONFIGS, base_model, gated_model, random_tokens
from host_artefact import SIZES, HostArtefact, compare, make_host
from onnx_artefact import feed, make_artefact, same, spread_gates
from oracle_model import OracleModel
from torch import nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.host_evicted import export_host_evicted, host_program
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.retention import NoGate

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
CASES = [*((case, "rg") for case in CONFIGS), ("qwen3-gqa", "rg10"), ("phi3-partial-rotary", "rg10")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], HostArtefact]:
    """Artefacts by case, each exported when a test first asks for it."""
    root = tmp_path_factory.mktemp("host")

    class Store(dict[tuple[str, str], HostArtefact]):
        def __missing__(self, case: tuple[str, str]) -> HostArtefact:
            self[case] = make_host(root / "-".join(case), spread_gates(gated_model(*case)), CONFIG)
            return self[case]

    return Store()


@pytest.fixture
def artefact(made: dict[tuple[str, str], HostArtefact]) -> HostArtefact:
    return made["qwen3-gqa", "rg"]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_same_survivors_tokens_and_logits(made: dict[tuple[str, str], HostArtefact], case: tuple[str, str]) -> None:
    eager, host = made[case].eager(), made[case].host()
    oracle = OracleModel(made[case].model, CONFIG)
    tokens = random_tokens(24 + 8 * 9 + 5)
    assert compare(host, eager, oracle, tokens) >= 5
    kept = host.survivors()
    assert len({tuple(sorted(row)) for row in kept.reshape(-1, kept.shape[-1])}) > 1, "the heads' choices do not differ"
    np.testing.assert_allclose(eager.state().log_beta, host.state().log_beta, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(eager.state().key, host.state().key, atol=1e-5)


def test_chunks_are_the_same_as_single_tokens(artefact: HostArtefact) -> None:
    tokens = random_tokens(100)
    logits = []
    engines = [artefact.host() for _ in range(3)]
    for engine, sizes in zip(engines, ((8,), (1,), (2, 7, 1, 4)), strict=True):
        logits.append(feed(engine, tokens, sizes)[-1])
        np.testing.assert_array_equal(engines[0].survivors(), engine.survivors())
        assert np.abs(logits[0] - logits[-1]).max() <= 1e-4


def test_padding_is_not_seen(artefact: HostArtefact) -> None:
    """A chunk of 3 in a graph for 8, after other chunks have left their rows and slots behind."""
    engine, fresh = artefact.host(), artefact.host()
    feed(engine, random_tokens(77, seed=1), (8, 1))
    engine.reset()
    tokens = random_tokens(41)
    assert same(feed(engine, tokens, (3,)), feed(fresh, tokens, (3,)))


@pytest.mark.parametrize("rope", ["short", "long"])
def test_longrope_factors_and_scaling(rope: str, tmp_path: Path) -> None:
    model = spread_gates(gated_model("phi3-longrope", rope=rope))
    artefact = make_host(tmp_path, model, CONFIG)
    engine = artefact.host()
    assert engine._rotary.attention_scaling > 1
    tokens = random_tokens(90)
    want, got = feed(artefact.eager(), tokens, SIZES), feed(engine, tokens, SIZES)
    assert max(np.abs(a - b).max() for a, b in zip(want, got, strict=True)) <= 1e-4


def test_far_positions_are_those_of_the_model(artefact: HostArtefact) -> None:
    """Where float32 angles are coarse, a host that were more exact than the model would rotate keys differently."""
    start = artefact.eager()
    feed(start, random_tokens(72), (8,))
    near, far = start.state(), 2**23
    moved = replace(near, seen=near.seen + far, positions=near.positions + far)
    eager, host = artefact.eager(), artefact.host()
    for engine in (eager, host):
        engine.load_state(moved)
    tokens = random_tokens(40, seed=2)
    want, got = feed(eager, tokens, SIZES), feed(host, tokens, SIZES)
    assert max(np.abs(a - b).max() for a, b in zip(want, got, strict=True)) <= 1e-4
    np.testing.assert_array_equal(eager.survivors(), host.survivors())


@pytest.mark.parametrize(("budget", "buffer", "chunk"), [(3, 1, 1), (5, 4, 1), (4, 9, 3), (8, 8, 8)])
def test_other_shapes(budget: int, buffer: int, chunk: int, tmp_path: Path) -> None:
    config = CacheConfig(budget, buffer, chunk, sinks=1, recent=1)
    artefact = make_host(tmp_path, spread_gates(gated_model("phi3-mha")), config)
    assert (tmp_path / "host_prefill.onnx").exists() == (chunk > 1)
    eager, host = artefact.eager(), artefact.host()
    tokens = random_tokens(60)
    want, got = feed(eager, tokens, (chunk, 1)), feed(host, tokens, (chunk, 1))
    assert max(np.abs(a - b).max() for a, b in zip(want, got, strict=True)) <= 1e-4
    np.testing.assert_array_equal(eager.survivors(), host.survivors())


@pytest.mark.parametrize("policy", ["streaming", "random", "keydiff"])
def test_other_policies_need_no_gates(policy: str, tmp_path: Path) -> None:
    base = base_model("llama-gqa")
    model = GatedModel(base, nn.ModuleList(NoGate(2) for _ in range(2))).eval()
    config = CacheConfig(12, 4, 4, policy=policy, sinks=2)
    artefact = make_host(tmp_path, model, config)
    outputs = onnx.load(tmp_path / "host_decode.onnx", load_external_data=False).graph.output
    assert not [value.name for value in outputs if value.name.startswith("gate")]
    eager, host = artefact.eager(), artefact.host()
    for engine in (eager, host):
        feed(engine, random_tokens(70), (4, 1, 2))
    np.testing.assert_array_equal(eager.survivors(), host.survivors())
    assert not host.state().log_beta.any()


def test_oldest_leave_first_on_ties(tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    for gate in model.gates:
        for parameter in gate.parameters():
            parameter.data.zero_()
        # log-beta is -8.8e-27 and, in float32, -0: all scores of head 1 are equal.
        gate.bias.data = torch.tensor([60.0, 120.0])
    engine = make_host(tmp_path, model, CONFIG).host()
    feed(engine, random_tokens(75), (8, 1))
    assert not engine.state().log_beta[:, 1].any()
    assert engine.state().log_beta[:, 0].all()
    newest = np.arange(engine.seen - engine.live, engine.seen)
    np.testing.assert_array_equal(np.sort(engine.survivors(), axis=-1), np.broadcast_to(newest, (2, 2, newest.size)))


@pytest.mark.parametrize("early", [20, 90], ids=["before-the-first-event", "after-events"])
def test_state_moves_between_engines(artefact: HostArtefact, early: int, tmp_path: Path) -> None:
    other = make_artefact(tmp_path, artefact.model, CONFIG, "gqa")
    tokens = random_tokens(early + 60)
    straight, onnx_engine, host = artefact.eager(), other.onnx(), artefact.host()
    feed(straight, tokens, (1,))
    feed(onnx_engine, tokens[:early], (5,))
    feed(host, random_tokens(77, seed=1), (8,))  # leftovers of another stream must not matter
    host.load_state(onnx_engine.state())
    feed(host, tokens[early : early + 30], (3,))
    onnx_engine.reset()
    onnx_engine.load_state(host.state())
    feed(onnx_engine, tokens[early + 30 :], (4,))
    np.testing.assert_array_equal(straight.survivors(), onnx_engine.survivors())
    np.testing.assert_allclose(straight.state().value, onnx_engine.state().value, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("host_decode.onnx", 1), ("host_prefill.onnx", 8)])
def test_the_interface_is_what_the_guide_says(artefact: HostArtefact, name: str, count: int) -> None:
    graph = onnx.load(artefact.folder / name, load_external_data=False).graph
    slots = [1, 2, 32, 32]
    rows = [1, 2, count, 32]
    want_in = {
        "hidden": [1, count, 64],
        "cos": [1, count, 32],
        "sin": [1, count, 32],
        "mask": [1, 1, count, 32 + count],
    }
    want_in |= {f"past.{layer}.{kind}": slots for layer in (0, 1) for kind in ("key", "value")}
    want_out = {"logits": [1, 1, 320]}
    want_out |= {f"new.{layer}.{kind}": rows for layer in (0, 1) for kind in ("key", "value")}
    want_out |= {"gate.0": [1, count, 2], "gate.1": [1, count, 2]}
    for values, want in ((graph.input, want_in), (graph.output, want_out)):
        found = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        assert found == want
        assert {value.type.tensor_type.elem_type for value in values} == {onnx.TensorProto.FLOAT}
    model = onnx.load(artefact.folder / name, load_external_data=False)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert model.opset_import[0].version == 18
    assert not model.functions


def test_both_graphs_read_the_same_weights(artefact: HostArtefact) -> None:
    def where(name: str) -> dict[str, dict[str, str]]:
        graph = onnx.load(artefact.folder / name, load_external_data=False).graph
        return {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.external_data
        }

    decode, prefill = where("host_decode.onnx"), where("host_prefill.onnx")
    assert decode == prefill
    assert len(decode) == 2 * (7 + 1) + 1, "linear layers, gates' first, output; what is small is in the graph"
    assert {entry["location"] for entry in decode.values()} == {"host_weights.bin"}
    size = (artefact.folder / "host_weights.bin").stat().st_size
    every = 4 * sum(p.numel() for p in artefact.model.parameters()) - 4 * 320 * 64
    assert size < every + 4096 * len(decode), "stored once"


def test_torch_export_gives_the_same_module(artefact: HostArtefact) -> None:
    program = host_program(artefact.model, CONFIG, 3)
    assert not program.range_constraints
    generator = torch.Generator().manual_seed(0)
    module_inputs = [
        torch.randn(tuple(spec.meta["val"].shape), generator=generator)
        for spec in program.graph.nodes
        if spec.op == "placeholder" and spec.name in program.graph_signature.user_inputs
    ]
    assert [tuple(x.shape) for x in module_inputs[:4]] == [(1, 3, 64), (1, 3, 32), (1, 3, 32), (1, 1, 3, 35)]
    out = program.module()(*module_inputs[:4], module_inputs[4:])
    assert [tuple(x.shape) for x in out] == [(1, 1, 320), *[(1, 2, 3, 32)] * 4, *[(1, 3, 2)] * 2]
    gates = artefact.model.gates
    normed = artefact.model.base.model.layers[0].input_layernorm(module_inputs[0])
    torch.testing.assert_close(out[5], gates[0].logit(normed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(policy="global", caps=((24, 24), (24, 24))), "budget that heads share"),
        (dict(policy="h2o"), "not one that a host runs: use one of trimkv, streaming, keydiff, random"),
        (dict(lookahead=4), "lookahead is 4"),
        (dict(kv_dtype="int8"), "float32 keys and values only"),
    ],
    ids=["shared", "attention", "lookahead", "int8-cache"],
)
def test_settings_that_a_host_does_not_run(settings: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        export_host_evicted(gated_model("llama-gqa"), CacheConfig(24, 8, 8, **settings), tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32 weights only: use --quant none"):
        export_host_evicted(gated_model("llama-gqa"), CONFIG, tmp_path / "new", scheme=SCHEMES["int8"])
