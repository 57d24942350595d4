"""Takes out reshapes that lead back to the shape a value had: each costs a runtime more than it does."""

from __future__ import annotations

import onnx_ir as ir


def drop_round_trips(graph: ir.Graph) -> int:
    """Where a chain of ``Reshape`` ends in the shape it began with, readers get the value at its beginning.

    Args:
        graph: as the exporter leaves it, with the shapes of its values.

    Returns:
        how many reshapes went.
    """
    for node in graph:
        if not _is_reshape(node):
            continue
        root = node.inputs[0]
        while root is not None and (maker := root.producer()) is not None and _is_reshape(maker):
            root = maker.inputs[0]
        out = node.outputs[0]
        if root is not None and _same(root.shape, out.shape) and not out.is_graph_output():
            ir.convenience.replace_all_uses_with(out, root)
    idle = [node for node in graph if _is_reshape(node)]
    gone = 0
    for node in reversed(idle):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
            gone += 1
    return gone


def _is_reshape(node: ir.Node) -> bool:
    return node.op_type == "Reshape" and node.domain in ("", "ai.onnx")


def _same(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True))
