"""A host-evicted graph in several parts, each with some of the layers, for devices that load no file of its size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path

import networkx as nx
import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from onnx.utils import Extractor

from trimkv_edge.hexagon import check_shards

# Weights of one context. A session addresses 3.75 GB (docs/npu.md), which also hold what the graph works on.
CONTEXT_BYTES = 3 * 2**30


def shards_needed(layer_bytes: int, head_bytes: int, layers: int) -> int:
    """The fewest parts whose weights are at most :data:`CONTEXT_BYTES` each; no more than one for each layer.

    Args:
        layer_bytes: of one layer; head_bytes: of the output layer, which the last part has beside its layers.
        layers: how many there are.
    """
    sizes = ((shards, ceil(layers / shards) * layer_bytes + head_bytes) for shards in range(1, layers))
    return next((shards for shards, size in sizes if size <= CONTEXT_BYTES), layers)


def cut(source: Path, layers: int, shards: int) -> list[Path]:
    """Writes the parts beside ``source``, in order; they read its file of weights.

    A part takes what all parts take (``cos``, ``sin``, ``mask``), the ``past`` of its layers, and ``hidden`` or, behind
    the first, ``hidden.{k}``: what layer k takes from those before. The part before it gives that beside the ``new``
    and ``gate`` of its layers; the last gives ``logits``. In integer graphs ``hidden.{k}`` is integers too.

    Args:
        source: a graph of :mod:`~trimkv_edge.export.host_evicted`, in float or with QDQ nodes.
        layers: how many it has.
        shards: how many parts; 1 gives ``[source]``.

    Raises:
        ConfigError: fewer than one layer for a part.
    """
    check_shards(shards, layers)
    if shards == 1:
        return [source]
    model = onnx.load(source, load_external_data=False)
    starts = [layers * part // shards for part in range(shards)]
    borders = _borders(model.graph, starts[1:])
    _name(model, borders)
    ends = [*(f"hidden.{start}" for start in starts[1:]), "logits"]
    made: list[Path] = []
    for (first, last), begin, end in zip(pairwise([*starts, layers]), ["hidden", *ends[:-1]], ends, strict=True):
        own = {f"{name}.{layer}" for layer in range(first, last) for name in ("past", "new", "gate")}
        inputs = [begin, *(one.name for one in model.graph.input if one.name in ("cos", "sin", "mask"))]
        inputs += [one.name for one in model.graph.input if one.name.rpartition(".")[0] in own]
        outputs = [end, *(one.name for one in model.graph.output if _layer_of(one.name) in own)]
        part = Extractor(model).extract_model(inputs, outputs)
        path = source.with_name(f"{source.stem}_{len(made)}.onnx")
        onnx.save(part, path)
        made.append(path)
    return made


def _layer_of(name: str) -> str:
    """``new.3`` of ``new.3.key``, ``gate.3`` of ``gate.3``."""
    return ".".join(name.split(".")[:2])


def _borders(graph: GraphProto, starts: Sequence[int]) -> dict[int, str]:
    """The one tensor on all ways from ``hidden`` to both a layer's keys and the logits, for layers ``starts``.

    The last of them before the layer's keys is its input: the norm behind it is not on the residual's way.
    """
    flow = nx.DiGraph((read, given) for node in graph.node for read in node.input for given in node.output if read)
    before = nx.immediate_dominators(flow, "hidden")

    def way(name: str) -> list[str]:
        found = [name]
        while found[-1] != "hidden":
            found.append(before[found[-1]])
        return found

    made = {name: node for node in graph.node for name in node.output}
    on_the_residual, borders = set(way("logits")), {}
    for start in starts:
        border = next(name for name in way(f"new.{start}.key") if name in on_the_residual)
        node = made[border]
        borders[start] = node.input[0] if node.op_type == "DequantizeLinear" else border
    return borders


def _name(model: ModelProto, borders: dict[int, str]) -> None:
    """Calls the borders ``hidden.{k}`` and notes their types."""
    graph = model.graph
    names = {old: f"hidden.{start}" for start, old in borders.items()}
    zeros = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        kinds = [zeros[node.input[2]] if node.op_type == "QuantizeLinear" else TensorProto.FLOAT for _ in node.output]
        for old, kind in zip(node.output, kinds, strict=True):
            if old in names:
                graph.value_info.append(_like_hidden(graph, names[old], kind))
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _like_hidden(graph: GraphProto, name: str, kind: int) -> ValueInfoProto:
    (hidden,) = (one for one in graph.input if one.name == "hidden")
    return helper.make_tensor_value_info(name, kind, [one.dim_value for one in hidden.type.tensor_type.shape.dim])
