"""Each hazard of in-place binding, in a graph made by hand."""

from __future__ import annotations

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from trimkv_edge.export.onnx_lint import lint, lint_standard

node = helper.make_node


def graph(
    *nodes: NodeProto, past: tuple[str, ...] = ("x",), present: tuple[str, ...] = ("x",), **more: list[int]
) -> ModelProto:
    """State tensors ``[4, 2]``, an index ``[1, 1]``, a row ``[1, 2]`` and an extra output ``y``."""
    value = helper.make_tensor_value_info
    inputs = [value(f"past.{name}", TensorProto.FLOAT, [4, 2]) for name in past]
    inputs += [value("at", TensorProto.INT64, [1, 1]), value("row", TensorProto.FLOAT, [1, 2])]
    inputs += [value("flag", TensorProto.BOOL, [])]
    outputs = [value(f"present.{name}", TensorProto.FLOAT, more.get("shape", [4, 2])) for name in present]
    made = helper.make_graph(nodes, "g", inputs, [*outputs, value("y", TensorProto.FLOAT, None)])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])


def write(past: str = "past.x", present: str = "present.x", row: str = "row") -> NodeProto:
    return node("ScatterND", [past, "at", row], [present], name="write")


READ_AFTER = node("Neg", ["present.x"], ["y"])


def test_safe_graph_has_no_findings() -> None:
    assert lint_standard(graph(write(), READ_AFTER)) == []


def test_reading_the_past_on_the_way_to_the_write_is_safe() -> None:
    gather = node("GatherND", ["past.x", "at"], ["old"])
    assert lint(graph(gather, node("Neg", ["old"], ["new"]), write(row="new"), READ_AFTER)) == []


@pytest.mark.parametrize(
    ("bad", "finding"),
    [
        (graph(write(), node("Neg", ["past.x"], ["y"])), "Neg 'y' reads past.x, but does not come before its writer"),
        (
            graph(write(), node("Identity", ["past.x"], ["view"]), node("Neg", ["view"], ["y"])),
            "Neg 'y' reads past.x, but does not come before its writer",
        ),
        (
            graph(write(present="w"), node("Identity", ["w"], ["present.x"]), node("Neg", ["w"], ["y"])),
            "present.x is made by Identity 'present.x', which cannot write in place",
        ),
        (
            graph(node("Where", ["flag", "row", "past.x"], ["present.x"]), READ_AFTER),
            "present.x is made by Where 'present.x', which cannot write in place",
        ),
        (
            graph(node("Neg", ["past.x"], ["n"]), write("n"), READ_AFTER),
            "present.x is made by ScatterND 'write' from 'n' instead of past.x",
        ),
        (graph(write("past.y"), READ_AFTER, past=("x", "y"), present=("x",)), "input past.y has no output present.y"),
        (graph(write(), READ_AFTER, present=("x", "z")), "output present.z has no input past.z"),
        (graph(write(), READ_AFTER, shape=[4, 3]), "past.x and present.x differ in type or shape"),
        (graph(node("Neg", ["row"], ["y"])), "present.x is not written by any node"),
    ],
)
def test_hazards_are_found(bad: ModelProto, finding: str) -> None:
    assert any(finding in line for line in lint(bad)), lint(bad)


def test_hazard_inside_a_function_is_found() -> None:
    body = [write("a", "b"), node("Neg", ["a"], ["c"])]
    function = helper.make_function("mine", "Bad", ["a", "at", "row"], ["b", "c"], body, [helper.make_opsetid("", 18)])
    model = graph(node("Bad", ["past.x", "at", "row"], ["present.x", "y"], domain="mine"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    assert any("Neg" in line and "reads past.x" in line for line in lint(model))


def test_hazard_inside_a_branch_is_found() -> None:
    value = helper.make_tensor_value_info("o", TensorProto.FLOAT, [4, 2])
    branch = helper.make_graph([node("Neg", ["past.x"], ["o"])], "b", [], [value])
    model = graph(write(), node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch))
    assert any("If 'y' reads past.x" in line for line in lint(model))


def test_foreign_operators_are_found() -> None:
    model = graph(write(), node("QuickGelu", ["present.x"], ["y"], domain="com.microsoft"))
    assert lint(model) == []
    assert lint_standard(model) == ["operator com.microsoft::QuickGelu is outside the allowed domains"]


def test_attention_must_return_the_cache_it_read() -> None:
    def attention(key: str, value: str) -> ModelProto:
        names = ["q", "q", "q", key, value, "n", "n"]
        made = node("GroupQueryAttention", names, ["y", "present.k", "present.v"], domain="com.microsoft", num_heads=1)
        return graph(node("Neg", ["row"], ["q"]), node("Neg", ["at"], ["n"]), made, past=("k", "v"), present=("k", "v"))

    assert lint(attention("past.k", "past.v")) == []
    assert len(lint(attention("past.v", "past.k"))) == 2


def branches(*writers: NodeProto) -> NodeProto:
    """An If whose branches make ``present.x``."""
    value = helper.make_tensor_value_info
    made = [
        helper.make_graph([writer], f"b{index}", [], [value(writer.output[0], TensorProto.FLOAT, [4, 2])])
        for index, writer in enumerate(writers)
    ]
    return node("If", ["flag"], ["present.x"], then_branch=made[0], else_branch=made[1])


def test_branches_that_write_in_place_are_safe() -> None:
    assert lint(graph(branches(write(present="a"), write(present="b")), READ_AFTER)) == []


def test_each_branch_is_looked_at() -> None:
    copying = node("Where", ["flag", "row", "past.x"], ["b"])
    found = lint(graph(branches(write(present="a"), copying), READ_AFTER))
    assert found == ["b is made by Where 'b', which cannot write in place: all of it is copied"]
    found = lint(graph(branches(write("other", "a"), write(present="b")), node("Neg", ["row"], ["other"]), READ_AFTER))
    assert found == ["a is made by ScatterND 'write' from 'other' instead of past.x: all of it is copied"]


def test_reading_beside_a_branch_is_found() -> None:
    found = lint(graph(branches(write(present="a"), write(present="b")), node("Neg", ["past.x"], ["y"])))
    assert found == ["Neg 'y' reads past.x, but does not come before its writer If 'present.x' in every order"]
