"""Long chunks over an int8 cache: read it once as float32 instead of once per token.

ONNX Runtime's attention over an int8 cache turns a row into float32 for every query that reads it, which is fast for
one token and slow for a hundred. So each layer chooses: chunks of up to :data:`LONGEST_DIRECT` tokens take the int8
operator, longer ones append rounded rows themselves, turn the layer's cache into float32 and attend over that. Both
write the cache in place and see the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

# About where the two take equally long: 5 tokens with two queries per KV head, more with one.
LONGEST_DIRECT = 8
_DOMAIN = "com.microsoft"
_PAST_KEY, _PAST_VALUE, _LAST, _TOTAL = range(3, 7)
_KEY_SCALE, _VALUE_SCALE = 12, 13


def branch_long_chunks(graph: ir.Graph) -> int:
    """Gives every attention over an int8 cache its second form.

    Args:
        graph: traced, with int8 ``past.X`` inputs.

    Returns:
        how many operators were changed.
    """
    found = [node for node in graph if node.op_type == "GroupQueryAttention" and len(node.inputs) > _VALUE_SCALE]
    if not found:
        return 0
    chunk = graph.inputs[0]  # token ids [1, T], or their embeddings [1, T, hidden_size]
    live = next(value for value in graph.inputs if value.name == "live_length")
    head = tape.Tape()
    size = head.op("Squeeze", [head.op("Shape", [chunk], {"start": 1, "end": 2})])
    limit = head.initializer(ir.tensor(np.array(LONGEST_DIRECT, np.int64), name="longest_direct"))
    is_long = head.op("Greater", [size, limit])
    graph.insert_before(graph[0], head.nodes)
    for value in head.initializers:
        graph.register_initializer(value)
    for index, node in enumerate(found):
        _branch(graph, _Long(node, live, size, f"attention{index}"), is_long)
    return len(found)


def _branch(graph: ir.Graph, long: _Long, is_long: ir.Value) -> None:
    node, name = long.node, long.name
    shapes = [(value.name, value.dtype, value.shape) for value in node.outputs]
    attributes = list(node.attributes.values())
    direct = ir.Node(node.domain, node.op_type, node.inputs, attributes, num_outputs=len(shapes), name=f"{name}.direct")
    outputs = long.build()
    branches = []
    for kind, nodes, results in (("direct", [direct], direct.outputs), ("long", long.tape.nodes, outputs)):
        for result, (_, dtype, shape) in zip(results, shapes, strict=True):
            assert dtype is not None
            result.dtype, result.shape = dtype, shape
        for position, value in enumerate(value for inner in nodes for value in inner.outputs):
            value.name = f"{name}.{kind}.{position}"
        branches.append(ir.Graph([], list(results), nodes=nodes, name=f"{name}.{kind}"))
    for value in long.tape.initializers:
        graph.register_initializer(value)
    direct_form, long_form = branches
    choice = ir.node(
        "If", [is_long], {"then_branch": long_form, "else_branch": direct_form}, num_outputs=len(shapes), name=name
    )
    graph.insert_before(node, choice)
    for old, new, (label, dtype, shape) in zip(node.outputs, choice.outputs, shapes, strict=True):
        assert dtype is not None
        new.dtype, new.shape = dtype, shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, label
    graph.remove(node, safe=True)


class _Long:
    """The branch of long chunks of one attention operator.

    Args:
        live, size: int64 ``[1]`` live entries before the chunk, and its length, a scalar.
    """

    def __init__(self, node: ir.Node, live: ir.Value, size: ir.Value, name: str) -> None:
        self.node, self.live, self.size, self.name, self.tape = node, live, size, name, tape.Tape()
        scale = node.inputs[_KEY_SCALE]  # [1, kv_heads, 1, head_dim]
        assert scale is not None
        self.kv_heads, _, self.width = _array(scale).shape[1:]
        self.heads = node.attributes["num_heads"].as_int()

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)

    def constant(self, label: str, array: np.ndarray) -> ir.Value:
        return self.tape.initializer(ir.tensor(array, name=f"{self.name}.{label}"))

    def build(self) -> tuple[ir.Value, ...]:
        """Output, keys and values after the chunk."""
        query, key, value = self.node.inputs[:3]
        where = self._coordinates()
        caches, rows, scales = [], [], []
        for label, new, past, scale in (
            ("key", key, _PAST_KEY, _KEY_SCALE),
            ("value", value, _PAST_VALUE, _VALUE_SCALE),
        ):
            table = self._table(scale)
            rounded = self.op(
                "QuantizeLinear",
                new,
                self.constant(f"{label}_scale", table.reshape(-1)),
                self.constant(f"{label}_zero", np.zeros(table.size, np.int8)),
                axis=2,
            )
            sizes = np.array([-1, self.kv_heads, self.width], np.int64)
            by_head = self.op("Reshape", rounded, self.constant(f"{label}_shape", sizes))
            by_head = self.op("Transpose", by_head, perm=[1, 0, 2])
            caches.append(self.op("ScatterND", self.node.inputs[past], where, by_head))
            rows.append(self.op("Cast", rounded, to=ir.DataType.FLOAT.value))
            scales.append(np.repeat(table, self.heads // self.kv_heads, axis=0).reshape(-1))
        # Levels stay levels: keys' scales go into the queries, values' into the output.
        scaled = self.op("Mul", query, self.constant("query_scale", scales[0]))
        read = [self.op("Cast", cache, to=ir.DataType.FLOAT.value) for cache in caches]
        attended = self.tape.op_multi_out(
            "GroupQueryAttention",
            [scaled, *rows, *read, *self.node.inputs[_LAST : _TOTAL + 1]],
            {
                "num_heads": self.heads,
                "kv_num_heads": self.kv_heads,
                "scale": self.node.attributes["scale"].as_float(),
                "do_rotary": 0,
            },
            domain=_DOMAIN,
            num_outputs=3,
        )
        return self.op("Mul", attended[0], self.constant("output_scale", scales[1])), *caches

    def _coordinates(self) -> ir.Value:
        """Where rows go, int64 ``[kv_heads, T, 3]``: batch 0, the head, the slot."""
        zero, one = (self.constant(f"{number}", np.array(number, np.int64)) for number in (0, 1))
        slots = self.op("Add", self.op("Range", zero, self.size, one), self.live)
        column = self.op("Unsqueeze", slots, self.constant("column", np.array([1], np.int64)))
        slot = self.op("Mul", column, self.constant("slot", np.array([[0, 0, 1]], np.int64)))
        heads = np.zeros((self.kv_heads, 1, 3), np.int64)
        heads[:, 0, 1] = np.arange(self.kv_heads)
        return self.op("Add", slot, self.constant("heads", heads))

    def _table(self, index: int) -> np.ndarray:
        value = self.node.inputs[index]
        assert value is not None
        return _array(value).reshape(self.kv_heads, self.width)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
