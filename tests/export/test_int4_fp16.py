"""4-bit weights in float16 arithmetic: what is stored, and that it is computed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cuda_artefact import CASES, cuda_artefact
from export_request import request_for
from factories import base_config, gated_model, random_tokens
from onnx import TensorProto, numpy_helper
from onnx_artefact import feed, same

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.onnx_weights import BLOCK
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import stored_bytes
from trimkv_edge.export.reference import ReferenceWeights, exact
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.export.verify import compare, stream_plan
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.runtime.engines.onnx import OnnxEngine

NAME = "int4-fp16"


def graph_of(folder: Path) -> tuple[onnx.GraphProto, dict[str, np.ndarray]]:
    graph = onnx.load(folder / "decoder.onnx").graph
    return graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def unpacked(packed: np.ndarray, scales: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Numbers of blocks of 32 with a scale each, float64 ``[rows, width]``."""
    rows = packed.reshape(scales.shape[0], -1)
    codes = np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1) if bits == 4 else rows
    centred = codes.astype(np.float64) - 2 ** (bits - 1)
    return (centred.reshape(len(rows), -1, BLOCK) * scales.astype(np.float64)[..., None]).reshape(len(rows), -1)[
        :, :width
    ]


def test_all_floats_that_count_are_halves() -> None:
    graph, values = graph_of(cuda_artefact("int4").folder)
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    # Seven of each layer, two of its gate, the output layer.
    bits = [attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"]
    assert sorted(bits) == [4] * 15 + [8] * bits.count(8)
    for node in products:
        assert values[node.input[2]].dtype == np.float16
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        assert settings["accuracy_level"] == 0  # activations are not rounded to int8
    embedding = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert values[embedding.input[2]].dtype == np.float16
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert {kind for name, kind in types.items() if name.endswith((".key", ".value"))} == {TensorProto.FLOAT16}
    assert types["past.log_beta"] == TensorProto.FLOAT
    # What float32 is left: rotary frequencies and smaller.
    assert max(value.size for value in values.values() if value.dtype == np.float32) == 16


def test_the_reference_has_the_numbers_of_the_file() -> None:
    made = cuda_artefact("int4")
    graph, values = graph_of(made.folder)
    model = ReferenceWeights(made.model, model_weights(made.model), SCHEMES[NAME], TARGETS["onnx"].rounding).fill(
        made.model
    )
    checked = 0
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        module = model.get_submodule(node.input[1].removeprefix("model.").removesuffix(".packed"))
        assert isinstance(module, torch.nn.Linear)
        want = unpacked(values[node.input[1]], values[node.input[2]], bits, module.in_features)
        np.testing.assert_array_equal(module.weight.numpy(), want.astype(np.float32))
        checked += 1
    assert checked >= 15


def eager(model: GatedModel, scheme: str) -> EagerEngine:
    rounding = TARGETS["onnx"].rounding if scheme == NAME else exact
    filled = ReferenceWeights(model, model_weights(model), SCHEMES[scheme], rounding).fill(model)
    return EagerEngine(filled, CASES["int4"][2])


def test_it_computes_what_its_numbers_mean() -> None:
    made = cuda_artefact("int4")
    tokens, plan = random_tokens(90, seed=3), stream_plan(12, 4, 4, events=8, singles=5)
    report = compare(eager(made.model, NAME), made.onnx(), tokens, plan, 2e-5, scripted=True)
    assert report.events >= 8
    assert 1e-5 < report.max_logit_diff < 4e-3 * max(1.0, report.max_logit)
    assert report.survivor_mismatches <= 0.01 * report.survivors
    assert report.greedy_mismatches <= 1
    # Against the numbers that were not rounded it is far off.
    other = compare(eager(made.model, "fp16"), made.onnx(), tokens, plan, 2e-5, scripted=True)
    assert other.max_logit_diff > 5 * report.max_logit_diff


def test_in_place_and_copying_engines_agree() -> None:
    made = cuda_artefact("int4")
    one, other = made.onnx(), made.onnx(aliased=False)
    tokens = random_tokens(50, seed=5)
    assert same(feed(one, tokens, [4, 3, 1]), feed(other, tokens, [4, 3, 1]))


def test_bytes_are_counted_by_hand() -> None:
    model = gated_model("qwen3-gqa")
    total = 0
    gates = {id(part) for gate in model.gates for part in gate.modules()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = name == "weight" and isinstance(module, torch.nn.Linear | torch.nn.Embedding)
            if packed:
                small = id(module) in gates or isinstance(module, torch.nn.Embedding)
                rows, width = parameter.shape
                total += rows * -(-width // 32) * ((32 if small else 16) + 2)
            elif id(module) in gates and not isinstance(module, torch.nn.Linear):
                total += 4 * parameter.numel()  # the last bias
            else:
                total += 2 * parameter.numel()
    assert stored_bytes(model, SCHEMES[NAME]) == total


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("phi3-mha").save_pretrained(folder)
    return folder


def request(model: Path, output: Path, **more: Any) -> Any:
    return request_for(model, output, **{"targets": ("onnx",), "quant": NAME, **more})


def test_the_whole_export_is_verified(model: Path, tmp_path: Path) -> None:
    run_export(plan_export(request(model, tmp_path / "out")), lambda line: None)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.quantization, manifest.cache.kv_dtype) == ("float16", NAME, "float16")
    parity = manifest.targets["onnx"].parity
    assert parity["events"] >= 5
    assert parity["max_logit_diff"] > 0
    assert "dynamic" not in parity
    _, values = graph_of(tmp_path / "out")
    weights = sum(value.nbytes for value in values.values() if value.dtype in (np.uint8, np.float16))
    # The last biases of two gates are float32; the graph holds the norms of a new model, which are equal, once.
    norms, biases = 4 * 64 * 2, 4 * 32
    assert 0 <= manifest.bytes.weights - (weights + 2 * 4 * 4) <= norms + biases
    engine = OnnxEngine(tmp_path / "out", manifest, manifest.targets["onnx"], 1)
    assert {engine._arrays[f"{layer}.key"].dtype for layer in range(2)} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_dtype="float32"), "--quant int4-fp16 keeps float16 keys and values, not float32"),
        (dict(targets=("executorch",)), "executorch cannot run int4-fp16 weights"),
        (
            dict(ops=("standard",)),
            "standard keeps float32 keys and values only: use gqa, or leave out --quant int4-fp16",
        ),
        (dict(policy="global"), "policy global needs float32 keys and values: leave out --quant int4-fp16"),
    ],
)
def test_settings_that_cannot_be_honoured(model: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_export(request(model, tmp_path / "out", **change))


def test_floats_have_16_or_32_bits() -> None:
    with pytest.raises(ConfigError, match="float_bits of x is 8, but must be 16 or 32"):
        Scheme("x", 4, 8, 8, ("onnx",), float_bits=8)
    assert replace(SCHEMES["int4"], float_bits=16).dtype == "float16"
    assert SCHEMES["int4"].dtype == "float32"
