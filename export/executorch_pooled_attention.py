"""Attention backends of the ExecuTorch target where heads share a budget: head by head, each at its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.export.executorch_attention import Step
from trimkv_edge.export.executorch_cache import MASKED
from trimkv_edge.export.executorch_pooled import PooledLlamaCache, PooledPortableCache


class PooledLlamaStep(Step):
    """One forward pass, head by head, through ``llama::update_cache`` and ``llama::custom_sdpa``; no copy of the cache.

    Args:
        cache: the buffers.
        fill: int64 ``[1]``, tokens since the last event.
        count: tokens T of the chunk.
    """

    def __init__(self, cache: PooledLlamaCache, fill: Tensor, count: int) -> None:
        super().__init__()
        self.cache, self.count = cache, count
        self.starts, starts = [], (cache.lengths + fill).view(-1)
        for row, slots in enumerate(cache.slots):
            start = starts[row].item()
            torch._check(start >= 0)
            torch._check(start + count <= slots)
            self.starts.append(start)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See the base."""
        cache, ops = self.cache, torch.ops.llama
        heads, width = cache.heads, cache.head_dim
        queries = query.view(heads, -1, self.count, width).transpose(1, 2).contiguous()
        keys, values = (new.reshape(heads, self.count, 1, width) for new in (key, value))
        outputs = []
        for head in range(heads):
            row = layer * heads + head
            start, mine = self.starts[row], slice(head, head + 1)
            ops.update_cache(keys[mine], cache.key(row), start)
            ops.update_cache(values[mine], cache.value(row), start)
            outputs.append(
                ops.custom_sdpa(queries[mine], cache.key(row), cache.value(row), start, None, 0.0, True, scale)
            )
        return torch.cat(outputs, dim=2)


class PooledPortableStep(Step):
    """One forward pass in core ATen operators, head by head; arguments as for :class:`PooledLlamaStep`."""

    def __init__(self, cache: PooledPortableCache, fill: Tensor, count: int) -> None:
        super().__init__()
        self.cache, self.count = cache, count
        self.slots = cache.lengths + fill + torch.arange(count, dtype=torch.int64)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See the base. The cache is the left factor, so that no transposed copy of it is made."""
        cache, count = self.cache, self.count
        group, width = query.shape[1] // cache.heads, cache.head_dim
        grouped = (query[0] * scale).contiguous().view(cache.heads, group * count, width)
        keys, values = (new[0].contiguous() for new in (key, value))
        outputs = []
        for head in range(cache.heads):
            row = layer * cache.heads + head
            slots = self.slots[row]
            cache.key(row).index_put_((slots,), keys[head])
            cache.value(row).index_put_((slots,), values[head])
            visible = torch.arange(cache.slots[row], dtype=torch.int64) <= slots.unsqueeze(1)
            scores = torch.bmm(cache.key(row).unsqueeze(0), grouped[head : head + 1].transpose(1, 2)).transpose(1, 2)
            scores = scores.reshape(group, count, -1) + torch.where(visible, 0.0, MASKED)
            weights = torch.softmax(scores, dim=-1).reshape(1, group * count, -1)
            outputs.append(torch.bmm(weights, cache.value(row).unsqueeze(0)).view(group, count, width))
        return torch.cat(outputs).transpose(0, 1).reshape(1, count, -1, width)
