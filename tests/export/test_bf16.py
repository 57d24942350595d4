"""bfloat16 artefacts end to end: what is stored, what the stand-in computes, and where they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_artefact import cuda_artefact, emulated
from export_request import request_for
from factories import base_config, gated_model, random_tokens
from faulty_onnx import KeepsTheNewest, ReadsAhead
from onnx import TensorProto, helper, numpy_helper
from onnx_artefact import Artefact, feed

from trimkv_edge.bfloat16 import from_bfloat16, to_bfloat16
from trimkv_edge.errors import ArtefactError, ConfigError, VerificationError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.onnx_bf16 import widen
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.verify import check, compare, load_tolerance, stream_plan
from trimkv_edge.gpu.engine import CompiledEngine
from trimkv_edge.gpu.placement import moved
from trimkv_edge.manifest import ByteInfo, load_manifest
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.cuda_check import why_not
from trimkv_edge.runtime.engines.onnx import OnnxEngine
from trimkv_edge.runtime.engines.onnx_cuda import OnnxCudaEngine

BF16 = SCHEMES["bf16"]
PLAN = stream_plan(12, 4, 4, events=8, singles=5)


@pytest.fixture(scope="module")
def artefact() -> Artefact:
    return cuda_artefact("bfloat16")


def rounded(model: GatedModel) -> GatedModel:
    """The oracle: every number of the file in float32; gates are not rounded."""
    for name, parameter in model.named_parameters():
        if "retention_gate" not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


def oracle(artefact: Artefact) -> EagerEngine:
    return EagerEngine(rounded(moved(artefact.model, "cpu")), artefact.manifest.cache)


def test_the_graphs_hold_bfloat16(artefact: Artefact) -> None:
    decoder, evict = (onnx.load(artefact.folder / name).graph for name in ("decoder.onnx", "evict.onnx"))
    for graph in (decoder, evict):
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert {kind for name, kind in types.items() if name.endswith((".key", ".value"))} == {TensorProto.BFLOAT16}
        assert types["past.log_beta"] == types["present.log_beta"] == TensorProto.FLOAT
    assert {value.name: value.type.tensor_type.elem_type for value in decoder.output}["logits"] == TensorProto.FLOAT
    # Float32 are the gates and rotary frequencies.
    wide = {x.name for x in decoder.initializer if x.data_type == TensorProto.FLOAT and np.prod(x.dims) > 16}
    assert wide
    assert all("gate" in name for name in wide)


def test_weights_are_the_nearest_bfloat16(artefact: Artefact) -> None:
    graph = onnx.load(artefact.folder / "decoder.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer}
    layer = artefact.model.base.model.layers[1]
    for name, weight in (
        ("layers.1.self_attn.q_proj", layer.self_attn.q_proj.weight.T),
        ("layers.1.mlp.down_proj", layer.mlp.down_proj.weight.T),
        ("embed_tokens", artefact.model.base.model.embed_tokens.weight),
    ):
        (found,) = (value for own, value in stored.items() if own.endswith(f"{name}.weight"))
        np.testing.assert_array_equal(found, weight.detach().bfloat16().float().numpy())


def test_the_stand_in_computes_what_the_numbers_mean(artefact: Artefact, tmp_path: Path) -> None:
    report = compare(
        oracle(artefact), emulated(artefact, tmp_path), random_tokens(80, seed=3), PLAN, 2e-5, scripted=True
    )
    assert report.events >= 8
    # Steps of 4e-3 of a number, where float16 has 5e-4.
    assert 1e-3 < report.max_logit_diff < 3e-2 * max(1.0, report.max_logit)
    assert report.survivor_mismatches <= 0.02 * report.survivors


def test_weights_are_widened_just_ahead_of_their_readers(artefact: Artefact, tmp_path: Path) -> None:
    emulated(artefact, tmp_path)
    nodes = onnx.load(tmp_path / "scratch" / "decoder.onnx", load_external_data=False).graph.node
    wide = [(at, node.output[0]) for at, node in enumerate(nodes) if node.output[0].endswith(".widened")]
    assert len(wide) >= 2 * 7
    for at, name in wide:
        reader = next(place for place, node in enumerate(nodes) if name in node.input)
        assert at < reader <= at + 3  # a reader may have three of them


def test_every_result_is_rounded(artefact: Artefact, tmp_path: Path) -> None:
    engine = emulated(artefact, tmp_path)
    logits = feed(engine, random_tokens(30, seed=5), [4, 1])[-1]
    assert not (logits.view(np.uint32) & 0xFFFF).any()
    state = engine.state()
    for table in (state.key, state.value):
        np.testing.assert_array_equal(table, from_bfloat16(to_bfloat16(table)))
    assert (state.log_beta.view(np.uint32) & 0xFFFF).any()


def test_it_is_as_far_from_float32_as_torch_in_bfloat16(artefact: Artefact, tmp_path: Path) -> None:
    """torch's own bfloat16 kernels over the same stream, which round where the graph does."""
    tokens = random_tokens(40, seed=6)
    device = CompiledEngine(moved(artefact.model, "cpu", torch.bfloat16), artefact.manifest.cache, compiled=False)
    found = [feed(engine, tokens, [4]) for engine in (emulated(artefact, tmp_path), device, oracle(artefact))]
    before = [logits[:3] for logits in found]  # ahead of the first event all three read the same entries
    graph, torch_own, exact = (np.concatenate(logits) for logits in before)
    size = np.abs(exact).max()
    assert np.abs(graph - torch_own).max() < 2e-2 * size
    ratio = np.abs(graph - exact).mean() / np.abs(torch_own - exact).mean()
    assert 0.5 < ratio < 2


def test_large_models_are_widened_as_they_are_read(artefact: Artefact, tmp_path: Path) -> None:
    held = emulated(artefact, tmp_path / "held", dtype="bfloat16")
    large = ByteInfo(0, 4 * 2**30, 0)
    turned = emulated(artefact, tmp_path / "turned", dtype="bfloat16", bytes=large)
    assert (held._narrow, turned._narrow) == (False, True)
    tokens = random_tokens(60, seed=6)
    for one, other in zip(*(feed(engine, tokens, [4, 1, 3]) for engine in (held, turned)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2)
    np.testing.assert_array_equal(held.survivors(), turned.survivors())


@pytest.mark.parametrize(("faulty", "fault"), [(KeepsTheNewest, "survivors differ"), (ReadsAhead, "logits differ")])
def test_verification_still_finds_faults(
    artefact: Artefact, tmp_path: Path, faulty: type[OnnxEngine], fault: str
) -> None:
    tolerance = load_tolerance("bfloat16")
    engine = emulated(artefact, tmp_path, faulty)
    report = compare(oracle(artefact), engine, random_tokens(80, seed=3), PLAN, tolerance.score_rel, scripted=True)
    with pytest.raises(VerificationError, match=fault):
        check(report, replace(tolerance, greedy_share=1.0), "the artefact")


def test_rounding_is_the_graphs_own() -> None:
    """A product, a sum of a constant and what it moves, by hand."""
    weight = np.array([[1.0, 0.5], [3.0, -2.0]], np.float32)
    halves = helper.make_tensor("w", TensorProto.BFLOAT16, (2, 2), to_bfloat16(weight).tobytes(), raw=True)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["x16", "w"], ["product"]),
            helper.make_node("Transpose", ["product"], ["turned"], perm=[1, 0]),
            helper.make_node("Add", ["turned", "turned"], ["twice"]),
            helper.make_node("Cast", ["twice"], ["y"], to=TensorProto.FLOAT),
        ],
        "by hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 2))],
        [halves],
    )
    widen(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[1.001, 2.003], [0.1, -7.77]], np.float32)
    half = torch.bfloat16
    want = (torch.from_numpy(x).to(half).float() @ torch.from_numpy(weight)).to(half).float().T * 2
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], want.to(half).float().numpy())


def test_a_branch_is_not_followed() -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    with pytest.raises(VerificationError, match="a graph of its own"):
        widen(helper.make_graph([node], "outer", [], []))


class OnlyEvents(OnnxCudaEngine):
    """The engine for CUDA over memory of the CPU, which has kernels for the event alone."""

    def _check_floats(self) -> None:
        pass

    def _load(self, role: str, threads: int) -> Any:
        return super()._load("evict", threads)

    def _decoder_state(self) -> list[str]:
        return []


def test_states_and_events_of_the_engine_for_cuda(artefact: Artefact) -> None:
    eager = artefact.eager()
    feed(eager, random_tokens(28, seed=4), [4])
    assert eager.room == 0
    engine = OnlyEvents(artefact.folder, artefact.manifest, artefact.target, 1, device="cpu")
    engine.load_state(eager.state())
    assert {array.dtype.name for name, array in engine._arrays.items() if name.endswith("key")} == {"uint16"}
    for again in (False, True):
        first, second = eager.state(), engine.state()
        for name in ("key", "value"):
            want = torch.from_numpy(getattr(first, name).copy()).bfloat16().float().numpy()
            np.testing.assert_array_equal(getattr(second, name), want)
        np.testing.assert_array_equal(first.log_beta, second.log_beta)
        np.testing.assert_array_equal(eager.survivors(), engine.survivors())
        if not again:
            eager.evict()
            engine.evict()


@pytest.mark.skipif(why_not(onnxruntime) is not None, reason="no CUDA here")
def test_on_cuda_itself(artefact: Artefact, tmp_path: Path) -> None:
    device = OnnxCudaEngine(artefact.folder, artefact.manifest, artefact.target, 1)
    stand_in = emulated(artefact, tmp_path)
    tokens = random_tokens(90, seed=3)
    for start in range(0, 90, 10):
        one, other = (feed(engine, tokens[start : start + 10], [4, 3, 1, 1, 2]) for engine in (stand_in, device))
        assert np.abs(one[-1] - other[-1]).max() < 3e-2 * np.abs(one[-1]).max()
        stand_in.load_state(device.state())


def test_cpus_refuse(artefact: Artefact) -> None:
    for make in (
        lambda: artefact.onnx(),
        lambda: OnnxCudaEngine(artefact.folder, artefact.manifest, artefact.target, device="cpu"),
    ):
        with pytest.raises(ArtefactError, match=r"computes in bfloat16, .* use --engine onnx:cuda, or .* --quant fp16"):
            make()


def test_numbers_that_float16_does_not_hold(tmp_path: Path) -> None:
    model = gated_model("qwen3-gqa")
    model.base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 70000.0
    config = replace(cuda_artefact("bfloat16").manifest.cache)
    export_onnx(model, config, tmp_path, scheme=BF16)
    weights = [
        numpy_helper.to_array(x).astype(np.float32) for x in onnx.load(tmp_path / "decoder.onnx").graph.initializer
    ]
    assert max(weight.max() for weight in weights if weight.size > 100) == 70144.0


@pytest.mark.parametrize("targets", [("onnx",), ("torch",)])
def test_the_whole_export_says_bfloat16(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = tmp_path / "model"
    base_config("phi3-mha").save_pretrained(model)
    lines: list[str] = []
    request = request_for(model, tmp_path / "out", targets=targets, quant="bf16")
    run_export(plan_export(request), lines.append)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.quantization, manifest.cache.kv_dtype) == ("bfloat16", "bf16", "bfloat16")
    # 24 slots x 8 rows x (2 x 16 x 2 + 4) bytes, and 16 positions x 8 rows x 8 bytes.
    assert manifest.bytes.cache == 24 * 8 * 68 + 16 * 8 * 8
    target = manifest.targets[targets[0]]
    assert target.parity["events"] >= 5
    assert target.parity["max_logit_diff"] > 0
    emulating = [line for line in lines if "every result rounded to bfloat16" in line]
    assert len(emulating) == (targets == ("onnx",))
    assert bool(target.speed) == (targets == ("torch",))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ('session = Session.open(artefact, "onnx:cuda")' in card) == (targets == ("onnx",))
    assert ("pip install 'trimkv-edge[onnx-gpu]'" in card) == (targets == ("onnx",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_dtype="float16"), "--quant bf16 keeps bfloat16 keys and values, not float16"),
        (dict(quant="fp16", kv_dtype="bfloat16"), "--quant fp16 keeps float16 .* use --quant bf16"),
        (dict(targets=("executorch",)), "executorch cannot run bf16 weights"),
        (dict(ops=("standard",)), "standard keeps float32 keys and values only: use gqa, or leave out --quant bf16"),
        (dict(policy="global"), "policy global needs float32 keys and values: leave out --quant bf16"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base_config("phi3-mha").save_pretrained(tmp_path / "model")
    request = request_for(tmp_path / "model", tmp_path / "out", **{"targets": ("onnx",), "quant": "bf16", **change})
    with pytest.raises(ConfigError, match=message):
        plan_export(request)
    assert not (tmp_path / "out").exists()


def test_a_scheme_knows_two_kinds_of_16_bits() -> None:
    with pytest.raises(ConfigError, match="half of odd is 'float8'"):
        Scheme("odd", 16, 16, 16, ("onnx",), float_bits=16, half="float8")
