"""Linear layers and embeddings as ONNX operators with weights that are read, rounded and packed one at a time.

While tracing, the modules hold views of one zero in the shapes that the operators want; :func:`fill` gives the traced
graph lazy initialisers instead, so that saving it never holds more than a few tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

from trimkv_edge.errors import ModelError
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import module_bits, parameter_bits
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, parameter_slots

# One scale for so many weights: what ONNX Runtime's kernels are fastest with.
BLOCK = 32
# MatMulNBits: activations rounded to int8 by block; 0 would compute in float32.
INT8_ACTIVATIONS = 4
# Elements of tensors that are real while tracing: the exporter merges small initialisers that look alike.
_SMALL = 2**16
# Rows of a matrix that are rounded together: the largest would be in memory several times.
_ROWS = 4096
_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
}
Array = npt.NDArray[Any]
Source = Callable[[], Array]


class Stored(nn.Module):
    """A layer whose tensors stand for what ``sources`` will give."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, Source] = {}

    def store(self, name: str, shape: tuple[int, ...], source: Source, dtype: torch.dtype = torch.float32) -> None:
        """Adds a tensor of ``shape``, which takes no memory if it is large."""
        if math.prod(shape) <= _SMALL:
            self.register_buffer(name, _to_torch(source()).view(shape))
        else:
            self.register_buffer(name, torch.zeros(1, dtype=dtype).expand(shape))
            self.sources[name] = source


class PlainLinear(Stored):
    """``x @ W`` in the dtype of W, which is stored as the operator reads it, so that nothing has to be transposed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, load: dict[str, Source], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        weight = load["weight"]
        self.store("weight", (linear.in_features, linear.out_features), lambda: weight().T, dtype)
        self.with_bias = linear.bias is not None
        if self.with_bias:
            self.store("bias", (linear.out_features,), load["bias"], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        # A gate in float16 is handed float32, because its last bias is.
        out = x.to(self.weight.dtype) @ self.weight
        return out + self.bias if self.with_bias else out


class QuantizedLinear(Stored):
    """``com.microsoft::MatMulNBits``: symmetric, blocks of :data:`BLOCK` along the input."""

    packed: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(
        self, linear: nn.Linear, load: dict[str, Source], bits: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.size, self.bits, self.dtype = (linear.out_features, linear.in_features), bits, dtype
        rows, blocks = linear.out_features, -(-linear.in_features // BLOCK)
        quantized = _Quantized(load["weight"], bits, dtype)
        self.store("packed", (rows, blocks, BLOCK * bits // 8), lambda: quantized()[0], torch.uint8)
        self.store("scales", (rows, blocks), lambda: quantized()[1], dtype)
        self.with_bias = linear.bias is not None
        if self.with_bias:
            self.store("bias", (linear.out_features,), load["bias"], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        attributes: dict[str, Any] = dict(
            N=self.size[0],
            K=self.size[1],
            bits=self.bits,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS if self.dtype == torch.float32 else 0,
        )
        bias = (None, None, self.bias) if self.with_bias else ()
        return onnx_ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x.to(self.dtype), self.packed, self.scales, *bias),
            attributes,
            dtype=self.dtype,
            shape=(*x.shape[:-1], self.size[0]),
            version=1,
        )


class PlainEmbedding(Stored):
    """Rows of a table of floats."""

    weight: Tensor

    def __init__(self, embedding: nn.Embedding, load: dict[str, Source], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.store("weight", tuple(embedding.weight.shape), load["weight"], dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., T] -> [..., T, hidden_size]``."""
        return nn.functional.embedding(ids, self.weight)


class QuantizedEmbedding(Stored):
    """``com.microsoft::GatherBlockQuantized`` over 8-bit rows."""

    packed: Tensor
    scales: Tensor

    def __init__(
        self, embedding: nn.Embedding, load: dict[str, Source], bits: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype
        rows, width = embedding.weight.shape
        blocks = -(-width // BLOCK)
        quantized = _Quantized(load["weight"], bits, dtype)
        self.store("packed", (rows, blocks * BLOCK * bits // 8), lambda: quantized()[0].reshape(rows, -1), torch.uint8)
        self.store("scales", (rows, blocks), lambda: quantized()[1], dtype)
        self.width = width

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., T] -> [..., T, hidden_size]``."""
        return onnx_ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (self.packed, ids, self.scales),
            dict(bits=self.bits, block_size=BLOCK, gather_axis=0, quantize_axis=1),
            dtype=self.dtype,
            shape=(*ids.shape, self.width),
            version=1,
        )


def prepare(model: GatedModel, weights: Weights, scheme: Scheme) -> GatedModel:
    """A copy of ``model`` for tracing, whose large tensors come from ``weights`` when the graph is saved.

    Args:
        model: hollow or not; its own large weights are not read.
        weights: float32 values by parameter name.
        scheme: how they are stored.
    """
    memo: dict[int, Any] = {}
    names = {id(getattr(owner, own)): name for name, owner, own in parameter_slots(model)}
    stored, floats = module_bits(model, scheme), getattr(torch, scheme.dtype)
    for module in model.modules():
        bits = stored.get(id(module), 32)
        load = {
            own: _loader(weights, names[id(p)], floats if parameter_bits(bits, own, scheme.float_bits) == 16 else None)
            for own, p in module.named_parameters(recurse=False)
        }
        plain, dtype = bits >= 16, torch.float32 if bits == 32 else floats
        if isinstance(module, nn.Embedding):
            memo[id(module)] = (
                PlainEmbedding(module, load, dtype) if plain else QuantizedEmbedding(module, load, bits, dtype)
            )
        elif isinstance(module, nn.Linear):
            memo[id(module)] = PlainLinear(module, load, dtype) if plain else QuantizedLinear(module, load, bits, dtype)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                memo[id(parameter)] = nn.Parameter(_to_torch(load[own]()), requires_grad=False)
    return copy.deepcopy(model, memo)


def fill(graph: ir.Graph, traced: nn.Module) -> None:
    """Gives the initialisers of ``graph`` that stand for stored tensors their values, lazily."""
    stored = {
        f"{path}.{name}": (getattr(module, name), source)
        for path, module in traced.named_modules()
        if isinstance(module, Stored)
        for name, source in module.sources.items()
    }
    for name, value in graph.initializers.items():
        if name in stored:
            tensor, source = stored[name]
            dtype = _DTYPES[tensor.dtype]
            value.const_value = ir.LazyTensor(_as_tensor(name, source), dtype, ir.Shape(tuple(tensor.shape)), name=name)


def round_trip(weight: Tensor, bits: int, dtype: str = "float32") -> Tensor:
    """What a matrix ``[out, in]`` is after rounding to ``bits``: what the engine multiplies with, float32.

    ``dtype``: of floats of 16 bits, of any shape, and of the scales of fewer bits.
    """
    floats: torch.dtype = getattr(torch, dtype)
    if bits == 16:
        return weight.to(floats).float()
    packed, scales = quantize(weight.numpy(), bits)
    scales = torch.from_numpy(scales).to(floats).float().numpy()
    values = packed.reshape(len(packed), -1)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(len(packed), -1)
    centred = values.astype(np.float32) - 2 ** (bits - 1)
    full = centred.reshape(len(packed), -1, BLOCK) * scales[:, :, None]
    return torch.from_numpy(full.reshape(len(packed), -1)[:, : weight.shape[1]])


def quantize(weight: Array, bits: int) -> tuple[Array, Array]:
    """ONNX Runtime's own block quantisation of a float32 matrix ``[out, in]``.

    Returns:
        packed uint8 ``[out, blocks, BLOCK * bits / 8]`` with zero point ``2 ** (bits - 1)``, and scales float32
        ``[out, blocks]``.
    """
    from onnxruntime.capi import _pybind_state as kernels  # type: ignore[import-untyped]

    rows, width = weight.shape
    blocks = -(-width // BLOCK)
    packed = np.zeros((rows, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    run = {4: kernels.quantize_matmul_4bits, 8: kernels.quantize_matmul_8bits}[bits]
    for start in range(0, rows, _ROWS):
        part = weight[start : start + _ROWS]
        by_column = np.zeros((blocks * BLOCK, len(part)), np.float32)
        by_column[:width] = part.T
        unused = np.zeros((len(part), -(-blocks * bits // 8)), np.uint8)
        end = start + len(part)
        run(packed[start:end], by_column, scales[start:end], unused, BLOCK, len(part), blocks * BLOCK, True)
    return packed, scales


class _Quantized:
    """Packed rows and scales of one matrix; both are asked for one after the other, so the last result is kept."""

    def __init__(self, source: Source, bits: int, dtype: torch.dtype) -> None:
        self.source, self.bits, self.scales = source, bits, dtype

    def __call__(self) -> tuple[Array, Array]:
        return _quantize_last(self)


@lru_cache(maxsize=1)
def _quantize_last(which: _Quantized) -> tuple[Array, Array]:
    packed, scales = quantize(which.source(), which.bits)
    return packed, _to_numpy(torch.from_numpy(scales).to(which.scales))


def _loader(weights: Weights, name: str, half: torch.dtype | None) -> Source:
    """``half``: the type of 16 bits that it is stored in, or None."""

    def load() -> Array:
        given = weights(name)
        values = given.to(half or torch.float32)
        if half and values.isinf().any():
            raise ModelError(
                f"{name} holds {given.abs().max():.3g}, but float16 ends at 65504: use --quant bf16, none, int8 or int4"
            )
        return _to_numpy(values)

    return load


def _to_numpy(values: Tensor) -> Array:
    """numpy itself has no bfloat16; onnx's does."""
    if values.dtype is torch.bfloat16:
        return np.asarray(values.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(values.numpy())


def _to_torch(values: Array) -> Tensor:
    values = np.ascontiguousarray(values)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _as_tensor(name: str, source: Source) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(source()), name=name)
