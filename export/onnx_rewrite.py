"""What is done to a traced graph before it is written. Everything stays plain ONNX."""

from __future__ import annotations

from onnx import ModelProto, NodeProto


def clean(model: ModelProto) -> None:
    """Names the dynamic axis and drops what the exporter notes for debugging (stack traces with local paths)."""
    graph = model.graph
    graph.ClearField("value_info")
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = "T"
    model.producer_name, model.producer_version = "trimkv-edge", ""


def divide_by_roots(model: ModelProto) -> int:
    """``x * Reciprocal(Sqrt(v))`` becomes ``x / Sqrt(v)``: the form of RMSNorm that ONNX Runtime fuses.

    Returns:
        how many were changed.
    """
    graph = model.graph
    maker: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    dropped = []
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for own, other in ((0, 1), (1, 0)):
            inverse = maker.get(node.input[other])
            if inverse is None or inverse.op_type != "Reciprocal" or readers[inverse.output[0]] != 1:
                continue
            root = maker.get(inverse.input[0])
            if root is not None and root.op_type == "Sqrt":
                inputs = [node.input[own], root.output[0]]
                node.op_type = "Div"
                del node.input[:]
                node.input.extend(inputs)
                dropped.append(inverse)
                break
    for inverse in dropped:
        graph.node.remove(inverse)
    return len(dropped)
