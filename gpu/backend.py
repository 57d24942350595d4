"""Attention over the batched cache: writes a chunk at each stream's live length, then attends in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.gpu.cache import BatchedCache
from trimkv_edge.gpu.chunk import RightAligned, each


class BatchedAttention:
    """An :class:`~trimkv_edge.models.attention.AttentionBackend` for one forward pass of right-aligned chunks.

    Args:
        cache: in it every stream has at least ``max(count[b], 1)`` free slots, so that every write stays inside them.
        count: int64 ``[batch]``, tokens of the chunk that are a stream's own, 0 to T.
        length: T.
    """

    def __init__(self, cache: BatchedCache, count: Tensor, length: int) -> None:
        self._cache, self._chunk = cache, RightAligned(count, length)
        self._slot = cache.live.unsqueeze(1) + self._chunk.ahead
        self._start = cache.live - self._chunk.first.squeeze(1)

    def positions(self) -> Tensor:
        """Absolute positions of the chunk, int64 ``[batch, T]``; those of padding are of its first own token."""
        return self._cache.seen.unsqueeze(1) + self._chunk.ahead

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Stores the chunk's log-betas, float32 ``[batch, T, kv_heads]``."""
        self._write(self._cache.log_betas[layer], log_beta.transpose(1, 2))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query ``[batch, heads, T, head_dim]``, key and value ``[batch, kv_heads, T, head_dim]`` (after RoPE) ->
        ``[batch, T, heads, head_dim]``."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._write(keys, key)
        self._write(values, value)
        out: Tensor = torch.ops.trimkv.attend(query.contiguous(), keys, values, self._start, scale)
        return out

    def advance(self) -> None:
        """Counts the chunk, which every layer has written."""
        self._cache.advance(self._chunk.count)

    def _write(self, table: Tensor, rows: Tensor) -> None:
        """``rows [batch, kv_heads, T, ...]`` into ``table [batch, kv_heads, slots, ...]``."""
        table[(*each(table), self._slot.unsqueeze(1))] = self._chunk.own(rows).to(table.dtype)
