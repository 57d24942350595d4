"""Weights of the ExecuTorch target: what XNNPACK multiplies with, and the modules that the graph is traced from.

======= ===================================== ==================================================================
bits    weights                               activations
======= ===================================== ==================================================================
4       groups of 32, bfloat16 scales         rounded to int8 while running, a scale and zero point for each token
8       one float32 scale per output channel  float32
======= ===================================== ==================================================================

An embedding of 8 bits has a float32 scale for each token, one of 4 bits as in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import module_bits
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, parameter_slots

GROUP = 32
LIMITS = {4: (-8, 7), 8: (-128, 127)}
_ROWS = 4096


@dataclass(frozen=True)
class Late:
    """Weights of a module that are made when they are needed.

    Attributes:
        make: the missing tensors by their names in the module.
        bytes: of the packed weights, about.
    """

    make: Callable[[], dict[str, Tensor]]
    bytes: int = 0


class Codes(NamedTuple):
    """A rounded matrix: int8 ``[rows, columns]`` and float32 scales ``[rows, groups]``; it stands for their product."""

    codes: Tensor
    scale: Tensor


def round_weight(weight: Tensor, bits: int) -> Codes:
    """Rounds a matrix ``[rows, columns]``, symmetrically about 0.

    Raises:
        ConfigError: bits other than 4 and 8, or a width that groups of 32 do not divide.
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    block = (1, _group(weight.shape[1], bits))
    low, high = LIMITS[bits]
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS].float()
        scale, zero = choose_qparams_affine(
            rows, MappingType.SYMMETRIC, block, torch.int8, low, high, zero_point_dtype=torch.int8, keepdim=True
        )
        if bits == 4:
            scale = scale.bfloat16().float()
        codes[start : start + _ROWS] = quantize_affine(rows, block, scale, zero, torch.int8, low, high)
        scales.append(scale)
    return Codes(codes, torch.cat(scales))


def round_trip(weight: Tensor, bits: int) -> Tensor:
    """What a matrix is after rounding, float32 of the same shape."""
    codes, scale = round_weight(weight, bits)
    out = codes.float()
    # In place: a second copy of an output layer would be hundreds of megabytes.
    out.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return out


def round_activations(x: Tensor) -> Tensor:
    """``x`` as XNNPACK rounds it to int8, a scale and zero point for each token, back in float32 (same shape).

    After ``xnn_f32_qd8_asymmetric_quantization_params`` of XNNPACK: 0 has a code of its own.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(low == high, 1.0, 255.0 / (high - low))
    small, large = low * scale, high * scale
    zero = torch.where((small - 128) + (large + 127) > 0, -128 - small, 127 - large).clamp(-128, 127).round()
    return ((x * scale).round() + zero).clamp(-128, 127).sub(zero) / scale


def _group(columns: int, bits: int) -> int:
    if bits not in LIMITS:
        raise ConfigError(f"weights of {bits} bits are not known to executorch; use {' or '.join(map(str, LIMITS))}")
    if bits == 8:
        return columns
    if columns % GROUP:
        raise ConfigError(
            f"4-bit weights of executorch come in groups of {GROUP}, which do not divide a width of {columns}: "
            "use --quant int8, and no --embedding-bits 4"
        )
    return GROUP


class Zeros:
    """Tensors of one memory for each shape. Expanded ones will not do: ExecuTorch makes them contiguous one by one.

    numpy's zeros take no memory until they are written, torch's do."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of its own over the memory of all of this shape."""
        if (shape, dtype) not in self._made:
            kind = torch.zeros((), dtype=dtype).numpy().dtype
            self._made[shape, dtype] = torch.from_numpy(np.zeros(shape, kind))
        return self._made[shape, dtype].detach()


class QuantizedLinear(nn.Module):
    """Stands for a linear layer while the graph is traced; its numbers come late (see :func:`traceable`).

    Args:
        linear: gives the shape.
        bits: of the weights.
        bias: float32 values, or None.
        zeros: of the same model.
    """

    def __init__(self, linear: nn.Linear, bits: int, bias: Tensor | None, zeros: Zeros) -> None:
        super().__init__()
        self.bits, self.group = bits, _group(linear.in_features, bits)
        groups = (linear.out_features, linear.in_features // self.group)
        self.register_buffer("codes", zeros((linear.out_features, linear.in_features), torch.int8))
        self.register_buffer("scale", zeros(groups, torch.float32))
        self.register_buffer("zero_point", zeros(groups, torch.int8))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``, in the operators that the XNNPACK partitioner knows."""
        if self.bits == 4:
            x = _traced_rounding(x)
        weight = _operators().dequantize_affine(
            self.codes, (1, self.group), self.scale, self.zero_point, torch.int8, *LIMITS[self.bits]
        )
        out = torch.nn.functional.linear(x, weight)
        # Not in the linear operator: XNNPACK's weight-only form takes no float bias.
        return out if self.bias is None else out + self.bias


class QuantizedEmbedding(nn.Module):
    """An embedding: ``quantized_decomposed::embedding_byte`` or ``embedding_4bit`` in the program.

    Args:
        table: the rounded weights.
        bits: of the table.
    """

    def __init__(self, table: Codes, bits: int) -> None:
        super().__init__()
        self.bits = bits
        codes = table.codes
        if bits == 4:  # two to a byte, the first in the upper half; 8 stands for 0
            codes = (codes + 8).to(torch.uint8)
            codes = codes[:, ::2] << 4 | codes[:, 1::2]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", table.scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ``[...] -> float32 [..., width]``."""
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  (registers the operator)

        ops = torch.ops.quantized_decomposed
        lookup = ops.embedding_4bit if self.bits == 4 else ops.embedding_byte
        out: Tensor = lookup(self.codes, self.scale, None, *LIMITS[self.bits], ids)
        return out


def _traced_rounding(x: Tensor) -> Tensor:
    ops = _operators()
    block, limits = (*[1] * (x.ndim - 1), x.shape[-1]), LIMITS[8]
    scale, zero = ops.choose_qparams_affine(
        x, "ASYMMETRIC", block, torch.int8, *limits, torch.finfo(torch.float32).eps, torch.float32, torch.int8
    )
    codes = ops.quantize_affine(x, block, scale, zero, torch.int8, *limits)
    rounded: Tensor = ops.dequantize_affine(codes, block, scale, zero, torch.int8, *limits)
    return rounded


def _operators() -> Any:
    """torchao's operators themselves: its functions of the same names switch gradients off, and torch.export then takes
    a time that grows with the square of the layers."""
    import torchao.quantization.quant_primitives  # noqa: F401  (registers them)

    return torch.ops.torchao


@dataclass(frozen=True)
class Traceable:
    """A model to trace, without the weights of its linear layers.

    Attributes:
        model: all else is in memory.
        late: by module name, the missing tensors of that module.
    """

    model: GatedModel
    late: dict[str, Late]


def traceable(model: GatedModel, weights: Weights, scheme: Scheme) -> Traceable:
    """The model as ``scheme`` stores it; each linear layer's weights are read, and rounded, when they are asked for.

    Args:
        model: hollow or not; it is left as it is.
        weights: its float32 values by parameter name.
        scheme: bits of each kind of layer.

    Raises:
        ConfigError: a width that the scheme's groups do not divide.
    """
    names = {id(getattr(owner, own)): name for name, owner, own in parameter_slots(model)}
    bits = module_bits(model, scheme)
    zeros, memo = Zeros(), dict[int, Any]()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and bits[id(module)] < 32:
            memo[id(module)] = QuantizedEmbedding(
                round_weight(weights(names[id(module.weight)]), bits[id(module)]), bits[id(module)]
            )
        elif isinstance(module, nn.Linear) and bits[id(module)] < 32:
            bias = None if module.bias is None else weights(names[id(module.bias)])
            memo[id(module)] = QuantizedLinear(module, bits[id(module)], bias, zeros)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for _, owner, own in parameter_slots(model):
        parameter = getattr(owner, own)
        if id(owner) in memo:
            continue
        hollow = id(parameter) in matrices and id(parameter) not in embeddings
        value = zeros(tuple(parameter.shape), torch.float32) if hollow else weights(names[id(parameter)])
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    made = copy.deepcopy(model, memo)
    late: dict[str, Late] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            name, width = names[id(module.weight)], bits[id(module)]
            if width < 32:
                late[path] = Late(partial(_codes, weights, name, width), module.weight.numel() * width // 8)
            elif id(module.weight) not in embeddings:
                late[path] = Late(partial(_floats, weights, name), module.weight.numel() * 4)
    return Traceable(made, late)


def _codes(weights: Weights, name: str, bits: int) -> dict[str, Tensor]:
    return round_weight(weights(name), bits)._asdict()


def _floats(weights: Weights, name: str) -> dict[str, Tensor]:
    return {"weight": nn.Parameter(weights(name), requires_grad=False)}


def reference_model(model: GatedModel, weights: Weights, scheme: Scheme) -> GatedModel:
    """An eager float32 model of the same rounded weights, which rounds activations where the program does.

    Args:
        model, weights, scheme: as for :func:`traceable`.
    """
    from trimkv_edge.export.reference import ReferenceWeights

    made = ReferenceWeights(model, weights, scheme, lambda weight, bits, _: round_trip(weight, bits)).fill(model)
    bits = module_bits(made, scheme)
    for module in made.modules():
        if isinstance(module, nn.Linear) and bits.get(id(module)) == 4:
            # Not a hook: copies that `fill` makes share their hooks with the original.
            module.__class__ = _RoundingLinear
    return made


class _RoundingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(round_activations(x))
