"""Who stays where heads share a budget: entries of many rows compete. Written in ops that every target has.

Only the *values* of top-k are used, and each ranking is made unique in two steps: first by score, then, among equal
scores at the edge, by an integer that says who leaves first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max
# No score: below and above every one, and still finite.
_LOWEST, _HIGHEST = -3.4e38, 3.4e38


def keep_best(scores: Tensor, order: Tensor, valid: Tensor, count: int) -> Tensor:
    """The best ``count`` valid entries of each row, or all if there are fewer.

    Args:
        scores: float32 ``[rows, n]``.
        order: int64 ``[rows, n]``, distinct within a row, >= 0: of equal scores the lower leaves first.
        valid: bool ``[rows, n]``.
        count: entries that stay.

    Returns:
        bool ``[rows, n]``.
    """
    if count >= scores.shape[-1]:
        return valid
    if count == 0:
        return torch.zeros_like(valid)
    scores = torch.where(valid, scores, _LOWEST)
    edge = torch.topk(scores, count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # Everything above the edge stays; of those at the edge, the last in order.
    rank = torch.where(scores > edge, _NEVER, torch.where(scores == edge, order, -1))
    last = torch.topk(rank, count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return valid & (rank >= last)


def drop_excess(scores: Tensor, positions: Tensor, valid: Tensor, caps: Tensor, most: int) -> Tensor:
    """Rows that hold more than their cap lose their worst entries.

    Args:
        scores, positions, valid: ``[rows, slots]``; of equal scores the older entry leaves first.
        caps: int64 ``[rows, 1]``.
        most: no row is more than this above its cap.

    Returns:
        bool ``[rows, slots]``, what is left.
    """
    most = min(most, scores.shape[-1])
    excess = valid.to(torch.int64).sum(-1, keepdim=True) - caps
    at = torch.clamp(excess - 1, min=0, max=most - 1)
    scores = torch.where(valid, scores, _HIGHEST)
    edge = torch.topk(scores, most, dim=-1, largest=False, sorted=True).values.gather(-1, at)
    rank = torch.where(scores < edge, -1, torch.where(scores == edge, positions, _NEVER))
    last = torch.topk(rank, most, dim=-1, largest=False, sorted=True).values.gather(-1, at)
    return valid & ((excess <= 0) | (rank > last))
