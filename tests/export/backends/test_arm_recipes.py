"""Which tensors of an Arm graph have how many bits, read from the quantised graph itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_artefact import need
from factories import gated_model, random_tokens
from onnx_artefact import spread_gates
from torch.export import ExportedProgram
from torch.fx import Node

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.arm_quantize import quantized
from trimkv_edge.export.host_evicted import HostEvicted

need("tosa")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
PROFILES = {"int8": "TOSA-1.0+INT+int16", "a8w4": "TOSA-1.0+INT+int16+int4", "a16w8": "TOSA-1.0+INT+int16"}
# What only arranges numbers has one scale in and out: the device moves integers.
ARRANGES = (torch.ops.aten.view.default, torch.ops.aten.transpose.int, torch.ops.aten.reshape.default)
LAYERS = 2
LINEAR = 7 * LAYERS + 1  # of the decoder; a gate has more


def program(precision: str) -> ExportedProgram:
    from executorch.backends.arm.quantizer import TOSAQuantizer
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    module = HostEvicted(spread_gates(gated_model("llama-gqa")))
    spec = TosaCompileSpec(PROFILES[precision])
    made = quantized(module, CONFIG, {"decode": 1}, precision, lambda: TOSAQuantizer(spec), random_tokens(48))
    return made["decode"]


def encoding(node: Node) -> tuple[Any, ...]:
    """Scale, zero point, smallest and largest integer, type."""
    while "quantize_per_tensor" not in str(node.target):
        node = node.all_input_nodes[0]
    return node.args[1:6]


def weight_bits(made: ExportedProgram, node: Node) -> int:
    """Bits that the integers of a linear layer's weight need; one scale for each of its rows."""
    stored = node.args[1]
    assert isinstance(stored, Node)
    assert "dequantize_per_channel" in str(stored.target)
    source = stored.args[0]
    assert isinstance(source, Node)
    integers = made.state_dict[made.graph_signature.inputs_to_buffers[source.name]]
    scales = stored.args[1]
    assert isinstance(scales, Node)
    assert made.state_dict[made.graph_signature.inputs_to_buffers[scales.name]].shape == integers.shape[:1]
    largest = int(integers.abs().max())
    return 4 if largest <= 7 else 8


def path(node: Node) -> str:
    return [str(place) for place, _ in node.meta["nn_module_stack"].values()][-1]


@pytest.mark.parametrize(
    ("precision", "kept", "read", "bits"), [("int8", 8, 8, 8), ("a8w4", 8, 8, 4), ("a16w8", 16, 16, 8)]
)
def test_bits_of_every_tensor(precision: str, kept: int, read: int, bits: int) -> None:
    types = {8: torch.int8, 16: torch.int16}
    made = program(precision)
    nodes = list(made.graph.nodes)
    inputs = [node for node in nodes if node.name in made.graph_signature.user_inputs]
    (last,) = (node for node in nodes if node.op == "output")
    module = HostEvicted(gated_model("llama-gqa"))
    entering = {name: encoding(next(iter(node.users))) for name, node in zip(module.names()[0], inputs, strict=True)}
    leaving = {name: encoding(node) for name, node in zip(module.names()[1], last.args[0], strict=True)}
    for name, found in {**entering, **leaving}.items():
        assert found[4] == types[kept if name.startswith(("past.", "new.")) else 16], name
    for layer in range(LAYERS):
        for kind in ("key", "value"):  # a row comes back as the integers that it was
            assert entering[f"past.{layer}.{kind}"] == leaving[f"new.{layer}.{kind}"]
    layers = [node for node in nodes if node.target is torch.ops.aten.linear.default]
    assert len(layers) > LINEAR
    for node in layers:
        fine = "retention_gate" in path(node) or "lm_head" in path(node)
        assert encoding(node.args[0])[4] == types[16 if fine else read], path(node)
        eight = fine or "v_proj" in path(node) or "down_proj" in path(node)
        assert weight_bits(made, node) == (8 if eight else bits), path(node)
        (after,) = node.users
        assert encoding(after)[4] == torch.int16
    assert sum("lm_head" in path(node) for node in layers) == 1
    mixed = precision != "a16w8"
    seen = set()
    for node in nodes:
        if node.target in ARRANGES and "quantize_per_tensor" in str(node.args[0].target):
            for after in node.users:
                if "quantize_per_tensor" in str(after.target):
                    assert encoding(after) == encoding(node.args[0]), node.name
                    seen.add(node.target)
        elif node.target is torch.ops.aten.exp.default and mixed:
            assert encoding(node.args[0])[0] == 16 / 2**15
        elif node.target is torch.ops.aten.silu.default and mixed:
            again = node.args[0].args[0]  # the layer's output, rounded, then rounded to the table's scale
            assert encoding(again)[0] == pytest.approx(0.75 * encoding(again.args[0])[0], rel=1e-4)
    assert {torch.ops.aten.view.default, torch.ops.aten.transpose.int} <= seen
