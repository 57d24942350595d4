"""The lint of host-evicted graphs finds what it is for."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from trimkv_edge.export.host_lint import lint_host

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def model(
    nodes: list[onnx.NodeProto],
    output: int = FLOAT,
    shape: tuple[int | str, ...] = (2, 3),
    out_shape: tuple[int | str, ...] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", output, out_shape or shape)],
        [helper.make_tensor("axes", INT64, [1], [0])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def test_plain_float_graphs_pass() -> None:
    nodes = [helper.make_node("Sigmoid", ["x"], ["a"]), helper.make_node("Mul", ["a", "x"], ["y"])]
    assert lint_host(model(nodes)) == []


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")]), "com.microsoft::Gelu is not among"),
        (model([helper.make_node("LogSoftmax", ["x"], ["y"])]), "ai.onnx::LogSoftmax is not among"),
        (
            model([helper.make_node("ArgMin", ["x"], ["y"], axis=0, keepdims=1)], INT64, out_shape=(1, 3)),
            "value 'y' is INT64, not FLOAT",
        ),
        (model([helper.make_node("Neg", ["x"], ["y"])], shape=("T", 3)), "value 'x' has a dynamic axis"),
        (model([helper.make_node("Neg", ["x"], ["y"])], shape=(1, 1, 1, 2, 3)), "value 'y' has 5 axes"),
        (
            model([helper.make_node("Mystery", ["x"], ["z"], domain="own"), helper.make_node("Neg", ["x"], ["y"])]),
            "value 'z' has no known shape",
        ),
    ],
    ids=["contrib", "operator", "integer", "dynamic", "five-axes", "unknown"],
)
def test_findings(made: onnx.ModelProto, told: str) -> None:
    if "Mystery" in str(made):
        made.opset_import.append(helper.make_opsetid("own", 1))
    assert any(told in finding for finding in lint_host(made)), lint_host(made)
