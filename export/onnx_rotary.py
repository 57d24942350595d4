"""Rotary embedding as one ``com.microsoft::RotaryEmbedding`` per query and key instead of six small operators."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops

from trimkv_edge.models.gated import GatedModel

_FUNCTION = "apply_rotary_pos_emb"


class _Rotary:
    """Takes the place of transformers' function while tracing; the chunk's cosines are the operator's whole table."""

    def __init__(self) -> None:
        self._cos: Tensor | None = None
        self._halves: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if self._cos is not cos:  # once per pass, shared by all layers
            # Both halves of the rotated width have the same angles.
            self._cos = cos
            half = cos.shape[-1] // 2
            start = torch.zeros(1, dtype=torch.int64)
            self._halves = (cos[0, :, :half], sin[0, :, :half], start)
        return self._rotate(q), self._rotate(k)

    def _rotate(self, x: Tensor) -> Tensor:
        assert self._halves is not None
        cos, sin, start = self._halves
        batch, heads, count, width = x.shape
        rotated = 2 * cos.shape[-1]
        packed = x.transpose(1, 2).reshape(batch, count, heads * width)
        attributes: dict[str, Any] = (
            {} if rotated == width else dict(rotary_embedding_dim=int(rotated), num_heads=int(heads))
        )
        out = onnx_ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (packed, start, cos, sin),
            attributes,
            dtype=torch.float32,
            shape=packed.shape,
            version=1,
        )
        return out.view(batch, count, heads, width).transpose(1, 2)


@contextmanager
def fused_rotary(model: GatedModel) -> Iterator[None]:
    """While open, the model's attention layers trace the fused operator (they look the function up in their module)."""
    module: ModuleType = sys.modules[type(model.base.model.layers[0].self_attn).__module__]
    original = getattr(module, _FUNCTION)
    setattr(module, _FUNCTION, _Rotary())
    try:
        yield
    finally:
        setattr(module, _FUNCTION, original)
