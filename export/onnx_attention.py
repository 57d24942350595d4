"""Attention backends that write and read the bounded cache in ONNX operators. They are traced, never run in torch.

Both append a chunk at slots ``[live, live + T)`` of the cache inputs and hand back the new cache as the direct output
of the node that wrote it, so that a runtime which binds one buffer as input and output writes in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops

from trimkv_edge.kv_scales import KVScales

# Not -inf or finfo.min: fused kernels turn those into NaN (DESIGN section 8).
MASKED = -1e30


class OnnxAttention(ABC):
    """Base of both backends: collects what each layer makes during one traced forward pass.

    Args:
        keys, values: per layer, float32 ``[1, kv_heads, slots, head_dim]``; the cache before the step.
        live: int64 ``[1]``, live entries before the step.
        count: T, tokens of the chunk (symbolic while tracing).

    Attributes:
        keys, values: after the pass the cache after the step.
        retained: per layer what its gate gives, ``[1, T, ...]`` (:mod:`trimkv_edge.export.onnx_gates`).
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], live: Tensor, count: int) -> None:
        self.keys, self.values = list(keys), list(values)
        self.retained: list[Tensor] = []
        self.slots = live + torch.arange(count, dtype=torch.int64)

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Takes what a layer's gate gives for the chunk; layers come in order."""
        self.retained.append(log_beta)

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`~trimkv_edge.models.attention.AttentionBackend`."""


class GroupQueryAttention(OnnxAttention):
    """One ``com.microsoft::GroupQueryAttention`` per layer: append and attend over the live prefix, no mask.

    With ``scales`` the cache is int8, rounded and read inside the operator. Rotary stays outside (``do_rotary=0``), so
    that position and live length are independent.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], live: Tensor, count: int, scales: KVScales | None = None
    ) -> None:
        super().__init__(keys, values, live, count)
        self._scales = scales
        if keys[0].dtype.itemsize == 2:
            # For GPUs. CUDA reads the total on the host, where live_length is not, and a captured graph would keep the
            # first; it bounds buffers only, so the number of slots does. What is attended to follows from the last.
            self._last = self.slots[-1:].to(torch.int32)
            self._total = torch.full((1,), keys[0].shape[2], dtype=torch.int32)
        else:
            self._last = (live + (count - 1)).to(torch.int32)
            self._total = (live + count).to(torch.int32)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, count, width = query.shape
        kv_heads = key.shape[1]
        past_key, past_value = self.keys[layer], self.values[layer]
        packed = [x.transpose(1, 2).reshape(batch, count, -1) for x in (query, key, value)]
        attributes: dict[str, Any] = dict(
            num_heads=int(heads), kv_num_heads=int(kv_heads), scale=float(scale), do_rotary=0
        )
        inputs: list[Tensor | None] = [*packed, past_key, past_value, self._last, self._total]
        if self._scales:
            attributes.update(k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8)
            by_channel = [table[layer][None, :, None] for table in (self._scales.key, self._scales.value)]
            inputs += [None] * 5 + [torch.from_numpy(table) for table in by_channel]
        out, self.keys[layer], self.values[layer] = onnx_ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=((batch, count, heads * width), past_key.shape, past_value.shape),
            version=1,
        )
        return out.view(batch, count, heads, width)


class StandardAttention(OnnxAttention):
    """Only operators of the ONNX domain: ScatterND into the cache, masked attention over all slots.

    The mask and the write coordinates are built once and shared by all layers. The query heads of a KV head are rows
    of one matrix product, so grouped keys and values are never repeated.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], live: Tensor, count: int) -> None:
        super().__init__(keys, values, live, count)
        kv_heads, size = keys[0].shape[1:3]
        head = torch.arange(kv_heads, dtype=torch.int64)[:, None].expand(kv_heads, count)
        slot = self.slots[None].expand(kv_heads, count)
        self._where = torch.stack([torch.zeros_like(slot), head, slot], dim=-1).unsqueeze(0)
        visible = torch.arange(size, dtype=torch.int64)[None] <= self.slots[:, None]
        self._mask = torch.where(visible, 0.0, MASKED)
        self._row_mask: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, count, width = query.shape
        kv_heads, size = self.keys[layer].shape[1:3]
        group = heads // kv_heads
        keys = self.keys[layer] = self._write(self.keys[layer], key)
        values = self.values[layer] = self._write(self.values[layer], value)
        if self._row_mask is None:
            self._row_mask = self._mask.unsqueeze(0).expand(group, count, size).reshape(group * count, size)
        rows = (query * scale).reshape(batch, kv_heads, group * count, width)
        weights = torch.softmax(rows @ keys.transpose(2, 3) + self._row_mask, dim=-1)
        return (weights @ values).reshape(batch, heads, count, width).transpose(1, 2)

    def _write(self, past: Tensor, rows: Tensor) -> Tensor:
        return onnx_ops.symbolic("ScatterND", (past, self._where, rows), dtype=past.dtype, shape=past.shape, version=18)


BACKENDS: dict[str, type[OnnxAttention]] = {"gqa": GroupQueryAttention, "standard": StandardAttention}
