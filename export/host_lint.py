"""Static lint of host-evicted graphs: static shapes, float32 and few operators, so that one delegate can take all."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.shape_inference import infer_shapes

# What the supported families come down to, and activations that others of their kind have. NPU compilers refuse, or
# leave to the CPU, argmin, gather, scatter, where, log-sigmoid and tensors of integers.
_NAMES = """
    Add Concat Div Erf Gelu MatMul Mul Neg Pow Reciprocal ReduceMean Relu Reshape Sigmoid Slice Softmax Split Sqrt Sub
    Tanh Transpose Unsqueeze
"""
OPERATORS = frozenset(_NAMES.split())
_MOST_AXES = 4


def lint_host(model: ModelProto) -> list[str]:
    """What in a graph a toolchain may refuse, one line each; empty if there is nothing.

    Checked: operators of ONNX's own domain from :data:`OPERATORS`; every computed value float32, of known static shape,
    with at most four axes.
    """
    graph = infer_shapes(model, strict_mode=True, data_prop=True).graph
    findings = [
        f"operator {node.domain or 'ai.onnx'}::{node.op_type} is not among those that NPUs compile"
        for node in graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS
    ]
    known = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    names = [value.name for value in graph.input] + [name for node in graph.node for name in node.output if name]
    for name in names:
        fault = _fault(known.get(name))
        if fault:
            findings.append(f"value {name!r} {fault}")
    return findings


def _fault(value: ValueInfoProto | None) -> str:
    if value is None or not value.type.HasField("tensor_type"):
        return "has no known shape"
    tensor = value.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        return f"is {TensorProto.DataType.Name(tensor.elem_type)}, not FLOAT"
    if not all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in tensor.shape.dim):
        return "has a dynamic axis"
    return f"has {len(tensor.shape.dim)} axes" if len(tensor.shape.dim) > _MOST_AXES else ""
