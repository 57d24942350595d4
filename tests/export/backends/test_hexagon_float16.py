"""Operators for float16: the same numbers, all norms and sigmoids, and nothing that only looks like a norm."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from factories import gated_model
from host_artefact import make_host
from onnx import TensorProto, helper, numpy_helper
from onnx_artefact import spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.hexagon_float16 import for_float16

# Norms of two layers and of the logits; Qwen3 also has them on queries and keys.
NORMS = {"llama-gqa": 5, "phi3-partial-rotary": 5, "qwen3-gqa": 9}


def run(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize(("case", "norms"), NORMS.items())
def test_all_norms_and_sigmoids_of_a_model(case: str, norms: int, tmp_path: Path) -> None:
    make_host(tmp_path, spread_gates(gated_model(case)), CacheConfig(12, 4, 4))
    source = tmp_path / "host_prefill.onnx"
    fused = for_float16(source, tmp_path / "fused.onnx")
    graph = onnx.load(fused, load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["RMSNormalization"] == norms
    assert kinds["Tanh"] == 4  # of a gate and an MLP in each layer
    assert not {"Pow", "ReduceMean", "Sqrt", "Div", "Sigmoid"} & kinds.keys()
    rng = np.random.default_rng(1)
    feed = {
        node.name: rng.standard_normal(node.shape).astype(np.float32)
        for node in ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()
    }
    for one, other in zip(run(source, feed), run(fused, feed), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5, rtol=2e-5)


def norm(path: Path, power: float = 2, axis: int = -1, epsilon: float = 0.25, seen: bool = False) -> Path:
    """``x / sqrt(mean(x ** power) + epsilon) * weight``; ``seen``: its quotient is an output too."""
    constants = {"power": np.float32(power), "axes": np.array([axis]), "epsilon": np.float32(epsilon)}
    constants["weight"] = np.array([1, 2, 3, 4], np.float32)
    nodes = [
        helper.make_node("Pow", ["x", "power"], ["p"]),
        helper.make_node("ReduceMean", ["p", "axes"], ["m"]),
        helper.make_node("Add", ["m", "epsilon"], ["e"]),
        helper.make_node("Sqrt", ["e"], ["r"]),
        helper.make_node("Div", ["x", "r"], ["q"]),
        helper.make_node("Mul", ["weight", "q"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 4]) for name in ("x", "y", "q")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1 : 3 if seen else 2], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_epsilon_and_weight_by_hand(tmp_path: Path) -> None:
    fused = for_float16(norm(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    model = onnx.load(fused)
    assert [node.op_type for node in model.graph.node] == ["RMSNormalization"]
    assert [tensor.name for tensor in model.graph.initializer] == ["weight"]
    x = np.tile(np.array([1, -2, 3, -1], np.float32), (1, 4, 1))
    # The mean of squares is 15 / 4, with epsilon 4.
    np.testing.assert_allclose(run(fused, {"x": x})[0], np.tile([0.5, -2, 4.5, -2], (1, 4, 1)), atol=1e-6)


def test_sigmoid_by_hand(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx")
    x = np.array([-30, -1, 0, 2, 40], np.float32)
    want = [1 / (1 + math.exp(-number)) for number in x.tolist()]
    (got,) = run(for_float16(tmp_path / "a.onnx", tmp_path / "b.onnx"), {"x": x})
    np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("change", [{"power": 3}, {"axis": 1}, {"seen": True}])
def test_what_is_no_such_norm_stays(change: dict[str, float], tmp_path: Path) -> None:
    source = norm(tmp_path / "a.onnx", **change)  # type: ignore[arg-type]
    fused = for_float16(source, tmp_path / "b.onnx")
    assert [node.op_type for node in onnx.load(fused).graph.node] == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    x = np.abs(np.random.default_rng(0).standard_normal((1, 4, 4))).astype(np.float32)
    for one, other in zip(run(source, {"x": x}), run(fused, {"x": x}), strict=True):
        np.testing.assert_array_equal(other, one)
