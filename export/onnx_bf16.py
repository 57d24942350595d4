"""A stand-in for graphs in bfloat16, which ONNX Runtime computes on CUDA alone: float32 operators, and every result
rounded to bfloat16.

That is what its CUDA kernels do too: they add up in float32 and round once. The order in which they add is their own,
so a GPU's numbers are these up to the last of 8 bits. Weights stay in the artefact's file and are widened by the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

from trimkv_edge.errors import VerificationError
from trimkv_edge.manifest import Target

_HALF, _FULL = TensorProto.BFLOAT16, TensorProto.FLOAT
# Which input an output's type follows; elsewhere the first.
_TYPED_BY = {"Where": 1, "GatherBlockQuantized": 2}
# Their results are what they were given.
_MOVES = {"Concat", "Expand", "Gather", "GatherND", "Identity", "Reshape", "ScatterND", "Slice", "Split", "Squeeze"}
_MOVES |= {"Transpose", "Unsqueeze", "Where"}


def emulate_bfloat16(folder: Path, target: Target, scratch: Path) -> Target:
    """The same target with graphs that a CPU runs, to verify with: states are float32 there.

    Args:
        folder: the artefact.
        scratch: a folder inside it for the graphs; the weights stay where they are.

    Raises:
        VerificationError: a graph that the stand-in cannot follow.
    """
    files = dict(target.files)
    for role in ("decoder", "evict"):
        model = onnx.load(folder / files[role], load_external_data=False)
        widen(model.graph)
        if data := files.get(f"{role}_data"):
            (scratch / Path(data).name).hardlink_to(folder / data)
        path = scratch / Path(files[role]).name
        onnx.save(model, path)
        files[role] = str(path.relative_to(folder))
    return replace(target, files=files)


def widen(graph: GraphProto) -> None:
    """Turns a graph in place; see :func:`emulate_bfloat16`."""
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == _HALF}
    stored, widened, nodes = set(half), dict[str, str](), list[NodeProto]()
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _FULL
            half.add(value.name)
    for node in graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise VerificationError(
                f"{node.name} has a graph of its own, which bfloat16 is not emulated in: report this"
            )
        made = _makes_half(node, half)
        half |= made
        for index, name in enumerate(node.input):
            if name in stored and name not in widened:
                # Just ahead of its first reader: large models are run in this order, a matrix at a time.
                widened[name] = f"{name}.widened"
                nodes.append(helper.make_node("Cast", [name], [widened[name]], to=_FULL))
            node.input[index] = widened.get(name, name)
        nodes += [node, *_rounding(node, made)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _makes_half(node: NodeProto, half: set[str]) -> set[str]:
    """Which outputs of a node are bfloat16 in the graph as exported."""
    if node.op_type in ("Cast", "Constant"):
        found = next(helper.get_attribute_value(x) for x in node.attribute if x.name in ("to", "value"))
        return set(node.output) if _HALF in (found, getattr(found, "data_type", None)) else set()
    source = _TYPED_BY.get(node.op_type, 0)
    if node.op_type == "Shape" or len(node.input) <= source or node.input[source] not in half:
        return set()
    return {name for name in node.output if name}


def _rounding(node: NodeProto, made: set[str]) -> Iterator[NodeProto]:
    """Makes a node give float32, and rounds what it computed."""
    if node.op_type == "Cast" and made:
        next(attribute for attribute in node.attribute if attribute.name == "to").i = _FULL
    if node.op_type == "Constant" and made:
        raise VerificationError(f"{node.name} is a constant in bfloat16, which is not emulated: report this")
    for index, name in enumerate(node.output):
        # A cache holds what came in rounded.
        if name not in made or node.op_type in _MOVES or (node.op_type == "GroupQueryAttention" and index):
            continue
        node.output[index] = f"{name}.exact"
        yield helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=_HALF)
        yield helper.make_node("Cast", [f"{name}.rounded"], [name], to=_FULL)
