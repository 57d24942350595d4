"""Who stays where heads share a budget: entries of many rows compete. Written in ops that every target has.

Only the *values* of top-k are used, and each ranking is made unique in two steps: first by score, then, among equal
scores at the edge, by an integer that says who leaves first. Masks are applied by arithmetic where that is exact:
portable kernels choose between two tensors twenty times slower than they multiply and add.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = 2**62
# No score: below and above every one, and still finite.
_LOWEST, _HIGHEST = -3.4e38, 3.4e38


def keep_best(scores: Tensor, order: Tensor, valid: Tensor, count: int) -> Tensor:
    """The best ``count`` valid entries of each row, or all if there are fewer.

    Args:
        scores: float32 ``[rows, n]``, finite.
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
    scores = _masked(scores, valid, _LOWEST)
    edge = torch.topk(scores, count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    rank = _rank(scores, edge, order)
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
    scores = _masked(scores, valid, _HIGHEST)
    edge = torch.topk(scores, most, dim=-1, largest=False, sorted=True).values.gather(-1, at)
    rank = _rank(scores, edge, positions)
    last = torch.topk(rank, most, dim=-1, largest=False, sorted=True).values.gather(-1, at)
    return valid & ((excess <= 0) | (rank > last))


def _masked(scores: Tensor, valid: Tensor, level: float) -> Tensor:
    """Finite scores where valid, ``level`` elsewhere."""
    mask = valid.to(scores.dtype)
    return scores * mask + (1 - mask) * level


def _rank(scores: Tensor, edge: Tensor, order: Tensor) -> Tensor:
    """Below the edge -1, at it the order, above it a number that nothing reaches. int64."""
    above, at = (scores > edge).to(torch.int64), (scores == edge).to(torch.int64)
    return above * _NEVER + at * (order + 1) - 1
