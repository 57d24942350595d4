"""The ONNX form of a budget that heads share: each head has its own tensor of cap + B slots, and its own length.

State tensors of ``decoder.onnx`` and ``evict.onnx``, beside what :mod:`trimkv_edge.export.onnx` says:

================ ==================================== =========================================================
``{i}.{h}.key``  float32 ``[1, 1, cap + B, head_dim]`` decoder; head h of layer i, after RoPE; ``.value`` alike
``{i}.key``      float32 ``[slots, head_dim]``         evict; the same memory, the layer's heads back to back
``log_beta``     float32 ``[rows, W]``                 W = largest cap + B, row = layer * kv_heads + head
``positions``    int64 ``[rows, W - B]``               of kept entries, evict only
``lengths``      int64 ``[rows]``                      entries that each head kept; the decoder reads them
================ ==================================== =========================================================

``live_length`` counts the ring: tokens since the last event. A head's new entries lie behind its kept ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops as onnx_ops

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx_attention import MASKED


class PooledAttention:
    """Base of both backends; appends a chunk behind each head's live entries and attends, one head at a time.

    Args:
        keys, values: per row (layer * kv_heads + head), float32 ``[1, 1, cap + B, head_dim]``.
        lengths: int64 ``[rows]``; live: int64 ``[1]``, filled slots of the ring.
        count: T, tokens of the chunk (symbolic while tracing).
        heads: KV heads of a layer.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, live: Tensor, count: int, heads: int
    ) -> None:
        self.keys, self.values, self.heads = list(keys), list(values), heads
        self.retained: list[Tensor] = []
        self._count = count
        self._held = lengths + live

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Takes what a layer's gate gives for the chunk; layers come in order."""
        self.retained.append(log_beta)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`~trimkv_edge.models.attention.AttentionBackend`."""
        batch, heads, count, width = query.shape
        # Per token and KV head: its group's queries, its key, its value. One copy, and one split for all heads.
        by_head = [x.transpose(1, 2).reshape(batch, count, self.heads, -1) for x in (query, key, value)]
        packed = torch.cat(by_head, dim=3).view(batch, count, -1)
        parts = packed.split(packed.shape[2] // self.heads, dim=2)
        outputs = [self._head(layer * self.heads + head, part, width, scale) for head, part in enumerate(parts)]
        return torch.cat(outputs, dim=2).view(batch, count, heads, width)

    @abstractmethod
    def _head(self, row: int, packed: Tensor, width: int, scale: float) -> Tensor:
        """One KV head: queries, key and value side by side, ``[1, T, (group + 2) * head_dim]`` ->
        ``[1, T, group * head_dim]``."""


class PooledGroupQueryAttention(PooledAttention):
    """One ``com.microsoft::GroupQueryAttention`` per head: reads that head's live entries only, no mask."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        last, total = self._held + (self._count - 1), self._held + self._count
        self._last, self._total = (table.to(torch.int32).split(1) for table in (last, total))

    def _head(self, row: int, packed: Tensor, width: int, scale: float) -> Tensor:
        past_key, past_value = self.keys[row], self.values[row]
        group = packed.shape[2] // width - 2
        attributes: dict[str, Any] = dict(num_heads=group, kv_num_heads=1, scale=float(scale), do_rotary=0)
        out, self.keys[row], self.values[row] = onnx_ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (packed, None, None, past_key, past_value, self._last[row], self._total[row]),
            attributes,
            dtypes=(torch.float32,) * 3,
            shapes=((*packed.shape[:2], group * width), past_key.shape, past_value.shape),
            version=1,
        )
        return out


class PooledStandardAttention(PooledAttention):
    """Only operators of the ONNX domain: ScatterND into the head's tensor, masked attention over its slots."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._slots = self._held.unsqueeze(1) + torch.arange(self._count, dtype=torch.int64)

    def _head(self, row: int, packed: Tensor, width: int, scale: float) -> Tensor:
        count = self._count
        query, key, value = packed.split([packed.shape[2] - 2 * width, width, width], dim=2)
        slots = self._slots[row]
        zero = torch.zeros_like(slots)
        where = torch.stack([zero, zero, slots], dim=-1)
        keys = self.keys[row] = self._write(self.keys[row], where, key[0])
        values = self.values[row] = self._write(self.values[row], where, value[0])
        visible = torch.arange(keys.shape[2], dtype=torch.int64) <= slots.unsqueeze(1)
        bias = torch.where(visible, 0.0, MASKED)
        grouped = (query * scale).view(1, count, -1, width).transpose(1, 2)
        weights = torch.softmax(grouped @ keys.transpose(2, 3) + bias, dim=-1)
        return (weights @ values).transpose(1, 2).reshape(1, count, -1)

    @staticmethod
    def _write(past: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        return onnx_ops.symbolic("ScatterND", (past, where, rows), dtype=past.dtype, shape=past.shape, version=18)


POOLED_BACKENDS: dict[str, type[PooledAttention]] = {
    "gqa": PooledGroupQueryAttention,
    "standard": PooledStandardAttention,
}


def table_width(config: CacheConfig) -> int:
    """Columns W of the log-beta table: slots of the head with the largest cap."""
    assert config.caps is not None
    return max(max(heads) for heads in config.caps) + config.buffer
