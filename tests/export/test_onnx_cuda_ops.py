"""Whether ONNX Runtime's CUDA has a kernel for every operator of the graphs, and which of them its host computes.

No GPU is asked: the tables are typed from ONNX Runtime's docs/OperatorKernels.md (commit 001d12d2623f) for opsets 18
and 20, and the rule of placement from its core/framework/fallback_cpu_capability.cc.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
from cuda_artefact import CASES, CONFIG, POOLED, cuda_artefact
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx_evict import evict_model
from trimkv_edge.export.onnx_pooled_evict import pooled_evict_model

F32, F16, BF16 = "float", "float16", "bfloat16"
FLOATS, WHOLE = {F32, F16}, {"int64"}
MOVED = {F32, F16, BF16, "int64", "int32", "bool", "uint8"}
COMPARED = {F32, F16, "int64", "int32"}
# Operator -> types of its first input that counts (T).
KERNELS: dict[tuple[str, str], set[str]] = {
    ("", "Add"): {F32, F16, BF16, "int64", "int32"},
    ("", "And"): {"bool"},
    ("", "Cast"): MOVED,
    ("", "Clip"): {F32, F16, "int64"},
    ("", "Concat"): MOVED,
    ("", "ConstantOfShape"): WHOLE,
    ("", "Cos"): FLOATS,
    ("", "CumSum"): COMPARED,
    ("", "Div"): {F32, F16, BF16, "int64", "int32"},
    ("", "Equal"): {*COMPARED, "bool"},
    ("", "Expand"): MOVED,
    ("", "Gather"): MOVED,
    ("", "GatherElements"): MOVED,
    ("", "GatherND"): {F32, F16, BF16, "int64", "bool"},
    ("", "Greater"): COMPARED,
    ("", "GreaterOrEqual"): COMPARED,
    ("", "Identity"): MOVED,
    ("", "Less"): COMPARED,
    ("", "LessOrEqual"): COMPARED,
    ("", "MatMul"): {F32, F16, BF16},
    ("", "Max"): {F32, F16, BF16, "int64", "int32"},
    ("", "Min"): {F32, F16, BF16, "int64", "int32"},
    ("", "Mul"): {F32, F16, BF16, "int64", "int32"},
    ("", "Neg"): {F32, F16, BF16, "int64"},
    ("", "NonZero"): {F32, F16, "int64", "bool"},
    ("", "Not"): {"bool"},
    ("", "Or"): {"bool"},
    ("", "Pad"): {F32, F16, "bool"},
    ("", "Pow"): {F32, F16, BF16, "int64"},
    ("", "Range"): {F32, "int64", "int32"},
    ("", "ReduceMax"): COMPARED,
    ("", "ReduceMean"): FLOATS,
    ("", "ReduceMin"): COMPARED,
    ("", "ReduceSum"): {F32, F16, BF16, "int64", "int32"},
    ("", "Reciprocal"): FLOATS,
    ("", "Reshape"): MOVED,
    ("", "ScatterElements"): MOVED,
    ("", "ScatterND"): MOVED,
    ("", "Shape"): MOVED,
    ("", "Sigmoid"): {F32, F16, BF16},
    ("", "Sin"): FLOATS,
    ("", "Slice"): MOVED,
    ("", "Softmax"): {F32, F16, BF16},
    ("", "Softplus"): FLOATS,
    ("", "Split"): MOVED,
    ("", "Sqrt"): {F32, F16, BF16},
    ("", "Squeeze"): MOVED,
    ("", "Sub"): {F32, F16, BF16, "int64", "int32"},
    ("", "TopK"): {F32, F16, "int64", "int32"},
    ("", "Transpose"): MOVED,
    ("", "Unsqueeze"): MOVED,
    ("", "Where"): {F32, F16, BF16, "int64", "int32", "uint8"},
    ("com.microsoft", "GatherBlockQuantized"): {F32, F16, BF16},
    ("com.microsoft", "GroupQueryAttention"): {F16, BF16},
    ("com.microsoft", "MatMulNBits"): {F32, F16, BF16},
    ("com.microsoft", "RotaryEmbedding"): {F32, F16, BF16},
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): {F32, F16, BF16},
}
# Inputs that CUDA's kernels read on the host.
ON_HOST = {
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (1, 2, 3, 4),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
    "Split": (1,),
    "TopK": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "CumSum": (1,),
    "GroupQueryAttention": (6,),
}
_SMALL = 100  # elements of an initialiser that may be on either side
_BOOLS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not", "And", "Or"}
EVENTS = {
    "float16": CacheConfig(12, 4, 4, sinks=2, recent=3, kv_dtype="float16"),
    "float32": CONFIG,
    "recent": CacheConfig(24, 8, 8, "streaming", sinks=4),
    "keys": CacheConfig(24, 8, 8, "keydiff"),
    "global": replace(POOLED, min_per_head=2, threshold=0.1),
    "layer": replace(POOLED, policy="layer"),
}
ABLE = [*(name for name in CASES if name != "float32"), *(f"{name} event" for name in EVENTS)]
Graphs = dict[str, ModelProto]


def flat(model: ModelProto) -> ModelProto:
    return inline_local_functions(model)


def types_of(model: ModelProto) -> Iterator[tuple[NodeProto, list[str]]]:
    """Every node of a flat model with the types of its inputs."""
    graph = model.graph
    known = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    known.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    for node in graph.node:
        given = [known[name] for name in node.input if name]
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Constant":
            made = [settings["value"].data_type]
        elif node.op_type == "Cast":
            made = [settings["to"]]
        elif node.op_type in ("Shape", "Size", "NonZero"):
            made = [TensorProto.INT64]
        elif node.op_type in _BOOLS:
            made = [TensorProto.BOOL]
        elif node.op_type == "Where":
            made = [given[1]]
        elif node.op_type == "TopK":
            made = [given[0], TensorProto.INT64]
        elif node.op_type == "GroupQueryAttention":
            made = [given[0], known[node.input[3]], known[node.input[4]]]
        elif node.op_type == "GatherBlockQuantized":
            made = [given[2]]
        else:
            made = [given[0]] * len(node.output)
        known.update(zip(node.output, made, strict=True))
        yield node, [TensorProto.DataType.Name(kind).lower() for kind in given]


def without_kernel(model: ModelProto) -> set[tuple[str, str]]:
    """Operators that CUDA has not, or not for their type, with the type."""
    found = set()
    for node, given in types_of(flat(model)):
        if node.op_type == "Constant":
            continue  # an initialiser in ONNX Runtime
        counts = {"Where": 1, "GatherBlockQuantized": 2}.get(node.op_type, 0)
        if given[counts] not in KERNELS.get((node.domain, node.op_type), set()):
            found.add((node.op_type, given[counts]))
    return found


class Placement:
    """ONNX Runtime's rule: what follows from shapes alone is computed on the host."""

    def __init__(self, model: ModelProto) -> None:
        flattened = flat(model)
        self.nodes = [(node, given) for node, given in types_of(flattened) if node.op_type != "Constant"]
        inline = [attr.t for node in flattened.graph.node if node.op_type == "Constant" for attr in node.attribute]
        names = [node.output[0] for node in flattened.graph.node if node.op_type == "Constant"]
        sizes = dict(zip(names, inline, strict=True)) | {tensor.name: tensor for tensor in flattened.graph.initializer}
        self.small = {name for name, tensor in sizes.items() if np.prod(tensor.dims) <= _SMALL}
        self.fixed = set(sizes)
        self.inputs = {value.name for value in flattened.graph.input}
        self.made_on_host: set[str] = set()
        self.host: set[str] = set()  # operators
        self.host_reads: set[str] = set()
        for node, given in self.nodes:
            if node.op_type in ("Shape", "Size"):
                self.made_on_host.update(node.output)
            elif self._belongs(node, given):
                self.host.add(node.op_type)
                self.made_on_host.update(node.output)
                self.host_reads.update(node.input)

    def _belongs(self, node: NodeProto, given: list[str]) -> bool:
        read_there = ON_HOST.get(node.op_type, ())
        if not any(name in self.made_on_host for name in node.input) or {"float16", "bfloat16"} & set(given):
            return False
        return all(
            name in self.small or name in self.inputs or (name in self.made_on_host and place not in read_there)
            for place, name in enumerate(node.input)
        )

    def copies(self) -> set[str]:
        """Values that one side makes and the other reads."""
        found = set()
        for node, _ in self.nodes:
            on_host = (
                bool(node.output) and node.op_type not in ("Shape", "Size") and node.output[0] in self.made_on_host
            )
            for place, name in enumerate(node.input):
                if not name or name in self.fixed or node.op_type in ("Shape", "Size"):
                    continue
                wants_host = on_host or place in ON_HOST.get(node.op_type, ())
                if wants_host != (name in self.made_on_host):
                    found.add(name)
        return found


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    made = {name: onnx.load(cuda_artefact(name).folder / "decoder.onnx") for name in CASES}
    for name, config in EVENTS.items():
        build = evict_model if config.caps is None else pooled_evict_model
        made[f"{name} event"] = build(config, 2, 2, 32)
    return made


@pytest.mark.parametrize("name", ABLE)
def test_cuda_has_a_kernel_for_every_operator(name: str, graphs: Graphs) -> None:
    assert without_kernel(graphs[name]) == set()
    assert {item.version for item in graphs[name].opset_import if item.domain == ""} <= {18, 20}


def test_float32_attention_is_all_that_cuda_lacks(graphs: Graphs) -> None:
    assert without_kernel(graphs["float32"]) == {("GroupQueryAttention", "float")}
    assert {("MatMulNBits", "float16"), ("GatherBlockQuantized", "float16")} <= {
        (node.op_type, given[2 if node.op_type == "GatherBlockQuantized" else 0])
        for node, given in types_of(graphs["int4"])
    }


@pytest.mark.parametrize("name", ABLE)
def test_nothing_is_copied_between_host_and_device(name: str, graphs: Graphs) -> None:
    placement = Placement(graphs[name])
    assert placement.copies() == set()
    assert placement.host <= {"Squeeze", "Unsqueeze", "Concat"}


def test_a_total_computed_from_the_live_length_would_be_copied(graphs: Graphs) -> None:
    placement = Placement(graphs["float32"])
    assert "live_length" in placement.copies()
    assert "Add" in placement.host


def test_attention_of_16_bits_is_told_the_slots_as_a_constant(graphs: Graphs) -> None:
    decoder = graphs["float16"].graph
    fixed = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in decoder.initializer}
    makers = {name: node for node in decoder.node for name in node.output}
    nodes = [node for node in decoder.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    for node in nodes:
        assert fixed[node.input[6]].tolist() == [16]
        # The last entry that the last query sees comes from the slots of the chunk, on the device.
        chain, maker = [], makers[node.input[5]]
        while maker.op_type in ("Cast", "Slice"):
            chain.append(maker.op_type)
            maker = makers[maker.input[0]]
        assert sorted(chain) == ["Cast", "Slice"]
        assert "live_length" in maker.input


@pytest.mark.parametrize("name", EVENTS)
def test_survivors_do_not_hang_on_the_order_of_equal_values(name: str, graphs: Graphs) -> None:
    """TopK of CUDA may list ties in another order than the CPU's, so no event reads where its values were."""
    nodes = flat(graphs[f"{name} event"]).graph.node
    read = {value for node in nodes for value in node.input}
    found = [node for node in nodes if node.op_type == "TopK"]
    assert found
    assert not [node for node in found if node.output[1] in read]
