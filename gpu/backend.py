"""Attention over the batched cache: writes a chunk at each stream's live length, then attends in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.gpu.cache import BatchedCache


class BatchedAttention:
    """An :class:`~trimkv_edge.models.attention.AttentionBackend` for one forward pass of ``T`` tokens a stream.

    Chunks are right-aligned: of stream b the last ``count[b]`` of T tokens are its own, those before are padding, so
    that the last logits are always those of the last token. No shape depends on a length, and every write stays inside
    the slots: padding writes what the first real token writes, and a stream with nothing to read writes behind its
    live entries.

    Args:
        cache: in it every stream has at least ``max(count[b], 1)`` free slots.
        count: int64 ``[batch]``, 0 to T.
        length: T.
    """

    def __init__(self, cache: BatchedCache, count: Tensor, length: int) -> None:
        self._cache, self._count = cache, count
        own = count.clamp(min=1).unsqueeze(1)
        step = torch.arange(length, device=count.device)
        # Of the first own token in the chunk's order, and where it goes.
        first = length - own
        self._from = torch.maximum(step, first)
        self._slot = cache.live.unsqueeze(1) + self._from - first
        self._start = cache.live - first.squeeze(1)
        self._length = length

    def positions(self) -> Tensor:
        """Absolute positions of the chunk, int64 ``[batch, T]``; those of padding are of its first own token."""
        start = (self._cache.seen - self._cache.live).unsqueeze(1)
        return start + self._slot

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
        self._cache.advance(self._count)

    def _write(self, table: Tensor, rows: Tensor) -> None:
        """``rows [batch, kv_heads, T, ...]`` into ``table [batch, kv_heads, slots, ...]``."""
        stream = torch.arange(table.shape[0], device=table.device).view(-1, 1, 1)
        head = torch.arange(table.shape[1], device=table.device).view(1, -1, 1)
        if self._length > 1:
            rows = rows[stream, head, self._from.unsqueeze(1)]
        table[stream, head, self._slot.unsqueeze(1)] = rows.to(table.dtype)
