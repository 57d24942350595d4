"""Operators that the HTP computes closely in float16, in place of those that it does not (measured, docs/npu.md).

RMSNorm becomes one operator: its parts round the mean of squares, the sum and the root, which scales a token by one
error. Sigmoid becomes ``tanh(x / 2) / 2 + 1 / 2``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

# The first with RMSNormalization; what else is in the graph only takes more types since.
_OPSET = 23
_HALF = "sigmoid.half"


def for_float16(source: Path, output: Path) -> Path:
    """Writes a host-evicted graph with these operators; its weights stay where they are.

    Args:
        source: with norms of the parts ``x / sqrt(mean(x ** 2) + epsilon) * weight``.
        output: in the same folder.

    Returns:
        ``output``.
    """
    model = onnx.load(source, load_external_data=False)
    graph, norms = model.graph, _Norms(model)
    for root in [node for node in graph.node if node.op_type == "Sqrt"]:
        if parts := norms.around(root):
            _replace(model, parts, [norms.whole(parts)])
    sigmoids = [node for node in graph.node if node.op_type == "Sigmoid"]
    for node in sigmoids:
        _replace(model, [node], _tanh(node))
    if sigmoids:
        graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), _HALF))
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = _OPSET
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    onnx.save(model, output)
    onnx.checker.check_model(output)
    return output


def _replace(model: ModelProto, old: list[NodeProto], new: list[NodeProto]) -> None:
    nodes = model.graph.node
    at = list(nodes).index(old[0])
    for node in old:
        nodes.remove(node)
    for place, node in enumerate(new, at):
        nodes.insert(place, node)


def _tanh(node: NodeProto) -> list[NodeProto]:
    (name,) = node.output
    steps = [f"{name}.{step}" for step in ("half", "tanh", "scaled")]
    return [
        helper.make_node("Mul", [node.input[0], _HALF], steps[:1]),
        helper.make_node("Tanh", steps[:1], steps[1:2]),
        helper.make_node("Mul", [steps[1], _HALF], steps[2:]),
        helper.make_node("Add", [steps[2], _HALF], [name]),
    ]


class _Norms:
    """Finds the parts of a norm around its root."""

    def __init__(self, model: ModelProto) -> None:
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}

    def around(self, root: NodeProto) -> list[NodeProto]:
        """All six parts in order; none if the root is of something else, or a part is read elsewhere too."""
        parts = [root]
        for kind in ("Add", "ReduceMean", "Pow"):
            maker = self._makers.get(parts[0].input[0])
            if maker is None or maker.op_type != kind:
                return []
            parts.insert(0, maker)
        for kind in ("Div", "Mul"):
            readers = self._readers.get(parts[-1].output[0], [])
            if [reader.op_type for reader in readers] != [kind]:
                return []
            parts += readers
        square, mean, added, _, quotient, product = parts
        inside = {part.output[0] for part in parts[:-1]}
        lone = not inside & self._outputs and all(len(self._readers[name]) == 1 for name in inside)
        weights = [name for name in product.input if name in self._constants]
        numbers = [self._number(part.input[1]) for part in (square, mean, added)]
        fits = numbers[:2] == [2, -1] and numbers[2] is not None and quotient.input[0] == square.input[0]
        return parts if lone and fits and len(weights) == 1 and len(self._constants[weights[0]].dims) == 1 else []

    def whole(self, parts: list[NodeProto]) -> NodeProto:
        """The one operator."""
        square, _, added, _, _, product = parts
        (weight,) = (name for name in product.input if name in self._constants)
        epsilon = self._number(added.input[1])
        return helper.make_node("RMSNormalization", [square.input[0], weight], product.output, axis=-1, epsilon=epsilon)

    def _number(self, name: str) -> float | None:
        tensor = self._constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).item())
