"""What enters and leaves the delegate of a lowered graph: in another order than the model's, perhaps as integers."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from trimkv_edge.errors import VerificationError
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.host_border import Border, Port

_DTYPES = {torch.int8: "int8", torch.int16: "int16"}


def border_of(program: ExportedProgram, module: HostEvicted) -> Border:
    """The border of a program that is one delegate.

    Args:
        program: lowered; its user inputs and outputs are those of ``module``.

    Raises:
        VerificationError: something is computed outside the delegate.
    """
    inputs, outputs = module.names()
    nodes = list(program.graph_module.graph.nodes)
    (call,) = (node for node in nodes if "executorch_call_delegate" in str(node.target))
    (last,) = (node for node in nodes if node.op == "output")
    given = dict(zip(program.graph_signature.user_inputs, inputs, strict=True))
    entering = []
    for node in call.args[1:]:
        source = node.args[0] if _is(node, "quantize_per_tensor") else node
        entering.append(_port(given[source.name], node))
    leaving: dict[int, Port] = {}
    for name, node in zip(outputs, last.args[0], strict=True):
        source = node.args[0] if _is(node, "dequantize_per_tensor") else node
        if not _is(source, "getitem"):
            raise VerificationError(f"output {name} is computed outside the delegate: report this")
        leaving[source.args[1]] = _port(name, node)
    return Border(entering, [leaving[index] for index in range(len(leaving))])


def _is(node: Node, name: str) -> bool:
    return node.op == "call_function" and name in str(node.target)


def _port(name: str, node: Node) -> Port:
    if not _is(node, "quantize_per_tensor"):  # dequantize_per_tensor too
        return Port("float32", name=name)
    made: Any = node.args
    scale, zero_point, _, _, dtype = made[1:6]
    return Port(_DTYPES[dtype], float(scale), int(zero_point), name=name)
