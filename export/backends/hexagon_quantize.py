"""Host-evicted graphs in few bits for Qualcomm's HTP: ranges from streams that evict, QDQ nodes, integers in and out.

Weights are rounded for each output channel. What decides who stays (the gates), logits, norms and attention logits have
16-bit activations in every recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator, save_tensors_data
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray
from trimkv_edge.errors import VerificationError
from trimkv_edge.host_border import Encoding
from trimkv_edge.host_cache import HostCache, Rotary, padded

Feed = dict[str, FloatArray]
Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """Bits of activations and of linear layers' weights; beside 4-bit weights, those of :data:`_EIGHT` have 8."""

    activations: int
    weights: int


RECIPES = {"a16w8": Recipe(16, 8), "a8w8": Recipe(8, 8), "a16w4": Recipe(16, 4)}
_ACTIVATION = {8: QuantType.QUInt8, 16: QuantType.QUInt16}
# As in Qualcomm's own recipes; on tiny the last two make 96 instead of 94.6 % of the survivors.
_EIGHT = ("retention_gate", "lm_head", "v_proj", "down_proj")
# With 8-bit activations these keep 16: what they give is squared, summed up, ranked or exponentiated.
_FINE = frozenset(["Pow", "ReduceMean", "Sqrt", "Div", "Softmax"])
# Ranges of 16-bit tensors are wider than what was seen by this: a clipped number costs more than a third of a bit.
_MARGIN = 1.25
# Operators that only arrange numbers: what comes out has the encoding of what goes in.
_LAYOUT = frozenset(["Unsqueeze", "Transpose", "Reshape", "Split", "Slice"])


@dataclass(frozen=True)
class Float:
    """The float graphs of a model and what their host needs, for a stream on the CPU.

    Attributes:
        graphs: path by number of tokens.
        embedding: float32 ``[vocabulary, hidden_size]``.
    """

    graphs: dict[int, Path]
    config: CacheConfig
    embedding: FloatArray
    rotary: Rotary
    masked: float


def stream(model: Float, tokens: Sequence[int]) -> Iterator[tuple[int, Feed]]:
    """Drives the float graphs over ``tokens`` with eviction, and gives (tokens of the graph, its inputs) of every step.

    Chunks alternate with single tokens, so that both graphs see a cache at every state between two events. The inputs
    are the cache's own memory: use them before the next one.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = {
        chunk: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for chunk, path in model.graphs.items()
    }
    shapes = {node.name: node.shape for node in sessions[1].get_inputs()}
    layers = sum(name.startswith("past.") for name in shapes) // 2
    _, heads, _, width = shapes["past.0.key"]
    cache = HostCache(model.config, layers, heads, width, masked=model.masked)
    largest, start, turn = max(sessions), 0, 0
    while start < len(tokens):
        # One odd chunk and some single tokens of each few.
        count = (largest, 1, max(1, largest // 3), 1, 1)[turn % 5] if cache.seen >= model.config.budget else largest
        count = min(count, cache.room, len(tokens) - start)
        chunk = 1 if count == 1 else largest
        which = padded(count, chunk)
        ids = np.asarray(tokens[start : start + count])
        cos, sin = model.rotary.rows(cache.seen + which)
        feed: Feed = {
            "hidden": model.embedding[ids[which]][None],
            "cos": cos,
            "sin": sin,
            "mask": cache.mask(count, chunk),
        }
        for layer in range(layers):
            feed[f"past.{layer}.key"] = cache.key[layer : layer + 1]
            feed[f"past.{layer}.value"] = cache.value[layer : layer + 1]
        yield chunk, feed
        names = [node.name for node in sessions[chunk].get_outputs()]
        out = dict(zip(names, sessions[chunk].run(None, feed), strict=True))
        rows = [np.concatenate([out[f"new.{layer}.{kind}"] for layer in range(layers)]) for kind in ("key", "value")]
        gates = np.concatenate([out[f"gate.{layer}"] for layer in range(layers)]) if "gate.0" in out else None
        cache.append(rows[0], rows[1], gates, count)
        if not cache.room:
            cache.evict()
        start, turn = start + count, turn + 1


class _One:
    """A data reader of one sample."""

    def __init__(self, feed: Feed) -> None:
        self._feed: Feed | None = feed

    def get_next(self) -> Any:
        feed, self._feed = self._feed, None
        return feed


def measure(model: Float, tokens: Sequence[int], scratch: Path) -> dict[int, dict[str, Range]]:
    """Smallest and largest value of every tensor of each graph over a stream.

    Inputs and outputs have the same range in all graphs, and a layer's new keys (values) that of its past ones: one
    scale and zero point in and out, so that no step rounds the cache again.

    Returns:
        by tokens of the graph, then by tensor.
    """
    calibrators = {
        chunk: create_calibrator(
            path, None, str(scratch / f"augmented_{chunk}.onnx"), use_external_data_format=True, providers=None
        )
        for chunk, path in model.graphs.items()
    }
    for chunk, feed in stream(model, tokens):
        calibrators[chunk].collect_data(_One(feed))
    found = {
        chunk: {name: (float(np.min(data.lowest)), float(np.max(data.highest))) for name, data in made.items()}
        for chunk, made in ((chunk, calibrator.compute_data().data) for chunk, calibrator in calibrators.items())
    }
    graphs = {chunk: onnx.load(path, load_external_data=False) for chunk, path in model.graphs.items()}
    alike = {chunk: _alike(graphs[chunk], ranges) for chunk, ranges in found.items()}
    ends = [value.name for values in (graphs[1].graph.input, graphs[1].graph.output) for value in values]
    common = {name: _around(ranges[name] for ranges in alike.values()) for name in ends}
    # Once more: what only arranges an input, or becomes an output, follows it.
    return {chunk: _alike(graphs[chunk], {**ranges, **common}) for chunk, ranges in alike.items()}


def _around(ranges: Iterable[Range]) -> Range:
    every = list(ranges)
    return min(low for low, _ in every), max(high for _, high in every)


def quantise(source: Path, output: Path, ranges: dict[str, Range], recipe: Recipe) -> dict[str, Encoding]:
    """Writes a graph with QDQ nodes whose inputs and outputs are integers.

    Args:
        source: a float graph; output: its weights go beside it.
        ranges: of all its tensors.

    Returns:
        encodings of inputs and outputs by name.

    Raises:
        VerificationError: an input or output was left in float32.
    """
    model = onnx.load(source)
    cache = output.with_suffix(".ranges.json")
    ranges = dict(ranges)
    overrides = _overrides(model, recipe)
    for name, (low, high) in ranges.items():
        kind = overrides.get(name, [{}])[0].get("quant_type", _ACTIVATION[recipe.activations])
        if kind == QuantType.QUInt16:
            ranges[name] = low * _MARGIN, high * _MARGIN
    data: Any = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache)
    config = get_qnn_qdq_config(
        model,
        None,
        activation_type=_ACTIVATION[recipe.activations],
        weight_type=QuantType.QInt8,
        init_overrides=overrides,
    )
    quantize_static(
        model,
        output,
        None,
        calibrate_method=config.calibrate_method,
        activation_type=config.activation_type,
        weight_type=config.weight_type,
        op_types_to_quantize=config.op_types_to_quantize,
        per_channel=config.per_channel,
        use_external_data_format=True,
        extra_options=config.extra_options,
        calibration_cache_path=cache,
    )
    os.remove(cache)
    made = onnx.load(output)
    encodings = _open_ends(made)
    os.remove(output)
    data_file = output.with_suffix(".onnx.data")
    data_file.unlink(missing_ok=True)
    onnx.save(made, output, save_as_external_data=True, location=data_file.name)
    return encodings


def _alike(model: ModelProto, ranges: dict[str, Range]) -> dict[str, Range]:
    """One range for tensors that have one encoding: around operators that only arrange, and past with new rows."""
    pairs = [(name, name.replace("past.", "new.")) for name in ranges if name.startswith("past.")]
    pairs += [(node.input[0], out) for node in model.graph.node if node.op_type in _LAYOUT for out in node.output]
    groups: dict[str, set[str]] = {}
    for pair in pairs:
        group = {name for one in pair for name in groups.get(one, {one})}
        groups.update(dict.fromkeys(group, group))
    found = dict(ranges)
    for name, group in groups.items():
        if name in ranges:
            found[name] = _around(ranges[other] for other in group if other in ranges)
    return found


def _overrides(model: ModelProto, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Types of weights, by output channel, and of activations that need 16 bits."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        for name in node.input:
            tensor = weights.get(name)
            if node.op_type == "MatMul" and tensor is not None:
                axis = len(tensor.dims) - 1
                if weight_bits(name, recipe) == 8:
                    found[name] = [{"quant_type": QuantType.QInt8, "axis": axis, "symmetric": True}]
                else:
                    found[name] = [
                        {"quant_type": QuantType.QInt4, "axis": axis, "scale": scale, "zero_point": np.int8(0)}
                        for scale in int4_scales(numpy_helper.to_array(tensor))
                    ]
    if recipe.activations == 8:
        fine = _fine(model)
        found |= {name: [{"quant_type": QuantType.QUInt16}] for name in fine if name not in weights}
    return found


def weight_bits(name: str, recipe: Recipe) -> int:
    """Of a linear layer; ``name``: of it or its weight."""
    return 8 if any(part in name for part in _EIGHT) else recipe.weights


def int4_scales(weight: FloatArray) -> FloatArray:
    """The scale of each output channel, of some, that rounds it with the smallest square error.

    Args:
        weight: float32 ``[inputs, outputs]``.
    """
    best = largest = np.maximum(np.abs(weight).max(0), np.float32(1e-9)) / np.float32(7)
    least = np.full(largest.shape, np.inf)
    for share in np.linspace(0.5, 1, 26):
        scale = (largest * share).astype(np.float32)
        error = ((np.clip(np.rint(weight / scale), -8, 7) * scale - weight) ** 2).sum(0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _fine(model: ModelProto) -> set[str]:
    """Tensors on the way to gates and logits, around norms and attention logits."""
    gates = [node for node in model.graph.node if any("retention_gate" in name for name in node.input)]
    found = {name for value in model.graph.output for name in [value.name] if not name.startswith("new.")}
    for node in model.graph.node:
        if node.op_type in _FINE or node in gates:
            found.update(name for name in (*node.input, *node.output) if name)
    return found


def _open_ends(model: ModelProto) -> dict[str, Encoding]:
    """Takes the quantising nodes at the graph's inputs and outputs away."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    encodings: dict[str, Encoding] = {}
    gone: list[NodeProto] = []
    for value in graph.input:
        users = [node for node in graph.node if value.name in node.input]
        if len(users) != 1:
            raise VerificationError(_left(value.name, users))
        (node,) = users
        if node.op_type in _LAYOUT:  # rounded only behind it
            (rounded,) = (user for user in graph.node if node.output[0] in user.input)
            inside = f"{value.name}.float"
            graph.node.insert(
                0,
                helper.make_node("DequantizeLinear", [value.name, *rounded.input[1:]], [inside], domain=rounded.domain),
            )
            node.input[0], node = inside, rounded
        elif node.op_type == "QuantizeLinear":
            _rename(graph, node.output[0], value.name)
            gone.append(node)
        if node.op_type != "QuantizeLinear":
            raise VerificationError(_left(value.name, users))
        encodings[value.name] = _encoding(node, constants)
        value.type.tensor_type.elem_type = _type(encodings[value.name])
    for value in graph.output:
        (node,) = (node for node in graph.node if value.name in node.output)
        if node.op_type != "DequantizeLinear":
            raise VerificationError(_left(value.name, [node]))
        encodings[value.name] = _encoding(node, constants)
        value.type.tensor_type.elem_type = _type(encodings[value.name])
        integers = node.input[0]
        others = [user for user in graph.node if value.name in user.input]
        if others:  # its float form is read inside too
            node.output[0] = f"{value.name}.float"
            for user in others:
                user.input[:] = [node.output[0] if name == value.name else name for name in user.input]
        else:
            gone.append(node)
        _rename(graph, integers, value.name)
    for node in gone:
        graph.node.remove(node)
    del graph.value_info[:]
    return encodings


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _encoding(node: NodeProto, constants: dict[str, Any]) -> Encoding:
    scale, zero = constants[node.input[1]], constants[node.input[2]]
    return Encoding(zero.dtype.name, float(scale), int(zero))


def _type(encoding: Encoding) -> int:
    return int({"uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16}[encoding.dtype])


def _left(name: str, nodes: Sequence[NodeProto]) -> str:
    kinds = ", ".join(node.op_type for node in nodes) or "nothing"
    return f"{name} was not quantised (beside it: {kinds}): report this with the model's name and settings"
