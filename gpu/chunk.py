"""Chunks of streams that read different numbers of tokens: right-aligned, so that no shape depends on a length."""

from __future__ import annotations

import torch
from torch import Tensor


class RightAligned:
    """``T`` tokens of each stream, of which the last ``count[b]`` are its own and those before are padding.

    The last logits are so always those of the last token. Padding stands for the first own token: it goes to the same
    slot, holds the same numbers and has the same position. A stream with nothing to read is one whose one token is not
    counted: it writes behind its live entries.

    Args:
        count: int64 ``[batch]``, 0 to T.
        length: T.

    Attributes:
        first: int64 ``[batch, 1]``, where a stream's first own token is in the chunk.
        ahead: int64 ``[batch, T]``, tokens of its own before each.
    """

    def __init__(self, count: Tensor, length: int) -> None:
        self.count, self.length = count, length
        self.first = length - count.clamp(min=1).unsqueeze(1)
        self._from = torch.maximum(torch.arange(length, device=count.device), self.first)
        self.ahead = self._from - self.first

    def own(self, rows: Tensor) -> Tensor:
        """``[batch, kv_heads, T, ...]`` with the first own token in the place of padding."""
        if self.length == 1:
            return rows
        return rows[(*each(rows), self._from.unsqueeze(1))]


def each(table: Tensor) -> tuple[Tensor, Tensor]:
    """Indices that take every stream and KV head of ``[batch, kv_heads, ...]``, ``[batch, 1, 1]`` and
    ``[1, kv_heads, 1]``."""
    batch, heads = table.shape[:2]
    return (
        torch.arange(batch, device=table.device).view(-1, 1, 1),
        torch.arange(heads, device=table.device).view(1, -1, 1),
    )
