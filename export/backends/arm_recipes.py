"""How many bits each tensor of an Arm graph has: the precisions of ``tosa`` and ``npu:ethos-u85``.

============ ===================== ================================== =============================================
precision    weights               keys, values, linear layers' input everything else
============ ===================== ================================== =============================================
``int8``     8 bits                8 bits                             16 bits
``a8w4``     4; :data:`_EIGHT`: 8  8 bits                             16 bits
``a16w8``    8 bits                16 bits                            16 bits
============ ===================== ================================== =============================================

Weights have a scale for each output channel. The inputs of :data:`_FINE` layers keep 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

PRECISIONS = ("int8", "a8w4", "a16w8")
# Smallest scale of activations in 16 bits. Arm's own 2**-12 leaves a norm's mean of squares in the first of the 512
# intervals of the table that takes its inverse root.
_SMALLEST = 2.0**-24
# What decides who stays, the logits, and what adds to the residual stream most directly keep 8 bits beside 4.
_EIGHT = ("retention_gate", "lm_head", "v_proj", "down_proj")
# Linear layers whose inputs keep 16 bits beside 8.
_FINE = ("retention_gate", "lm_head")
# Softmax's exponent is cut at -16, which gives 0 in 16 bits anyway: 256 intervals of its table then span 16, not the
# whole range of attention logits.
_EXPONENT = 16 / 2**15
# Tables that read a linear layer. Their input has a scale of its own: without the step between, Arm's passes take the
# layer's output for 8 bits, as its input is, and refuse the table of 16.
_ACTIVATIONS = (
    torch.ops.aten.silu.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.sigmoid.default,
    torch.ops.aten.tanh.default,
)
_LAYOUT = ("view", "reshape", "transpose", "permute", "unsqueeze", "_to_copy", "to")


def rounding(precision: str, outputs: Sequence[str]) -> Any:
    """A configuration for Arm's quantizers.

    Args:
        precision: of :data:`PRECISIONS`.
        outputs: names of the graph's outputs, in order.
    """
    from executorch.backends.arm.quantizer import (
        get_symmetric_a16w8_quantization_config,
        get_symmetric_quantization_config,
    )
    from executorch.backends.arm.quantizer.quantization_config import TOSAQuantizationConfig
    from torchao.quantization.pt2e.observer import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import FixedQParamsQuantizationSpec

    class Wide(MinMaxObserver):  # type: ignore[misc]
        """Ranges twice those that calibration saw, since clipping costs more than one bit of 16."""

        margin = 2.0

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            scale, zero_point = super().calculate_qparams()
            return self.margin * scale, zero_point

    class Table(Wide):
        margin = 1.5

    found = get_symmetric_a16w8_quantization_config()
    wide = replace(found.input_activation, observer_or_fake_quant_ctr=Wide.with_args(eps=_SMALLEST))
    if precision == "a16w8":
        return replace(found, input_activation=wide, output_activation=wide)
    narrow = get_symmetric_quantization_config().input_activation
    # One integer more than ``wide``, or torchao would let both have one observer; tables span that range anyway.
    table = replace(wide, quant_min=-(2**15), observer_or_fake_quant_ctr=Table.with_args(eps=_SMALLEST))
    cached = replace(narrow, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2.0**-16))
    exponent = FixedQParamsQuantizationSpec(
        torch.int16, _EXPONENT, 0, quant_min=-(2**15), quant_max=2**15 - 1, qscheme=torch.per_tensor_symmetric
    )

    class Mixed(TOSAQuantizationConfig):  # type: ignore[misc]
        def get_input_act_qspec(self, node: Node | None = None, input_node: Node | None = None) -> Any:
            if node is not None and input_node is not None:
                if node.op == "output":
                    given: Any = node.args[0]
                    return cached if outputs[given.index(input_node)].startswith("new.") else wide
                if node.target is torch.ops.aten.linear.default and not _within(node, _FINE):
                    return narrow
                if node.target is torch.ops.aten.exp.default:
                    return exponent
                if node.target in _ACTIVATIONS or _squares_linear(node):
                    return table
            return super().get_input_act_qspec(node, input_node)

        def get_output_act_qspec(self, node: Node | None = None) -> Any:
            if node is not None:
                if node.op == "placeholder" and node.name.startswith("past"):
                    return cached
                if node.target is torch.ops.aten.sub.Tensor and _only_exponent(node):
                    return exponent
            return super().get_output_act_qspec(node)

        def get_weight_qspec(self, node: Node | None = None) -> Any:
            if precision == "a8w4" and node is not None and not _within(node, _EIGHT):
                return replace(self.weight, quant_min=-7, quant_max=7)
            return super().get_weight_qspec(node)

    return Mixed(wide, wide, found.weight, found.bias, precision)


def _within(node: Node, modules: Sequence[str]) -> bool:
    """Whether a node comes from a module that has one of these names in its path."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return any(part in modules for path in paths for part in path.split("."))


def _squares_linear(node: Node) -> bool:
    """Whether a node is the square, a table too, in a norm of queries or keys: it reads a linear layer."""
    if node.target is not torch.ops.aten.pow.Tensor_Scalar:
        return False
    source: Any = node.args[0]
    while isinstance(source, Node) and getattr(source.target, "_opname", "") in _LAYOUT:
        source = source.args[0]
    return isinstance(source, Node) and source.target is torch.ops.aten.linear.default


def _only_exponent(node: Node) -> bool:
    return all(user.target is torch.ops.aten.exp.default for user in node.users)
