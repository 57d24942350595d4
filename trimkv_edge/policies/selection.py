"""Who stays, given scores. Written in ops that every target has."""

from __future__ import annotations

import torch
from torch import Tensor

# What the settings protect stands above what a policy always keeps, and that above every score.
PROTECTED = 3.0e38
ALWAYS_KEPT = 1.0e38
_NEVER = torch.iinfo(torch.int64).max


def protect(
    scores: Tensor, positions: Tensor, seen: Tensor | int, sinks: int, recent: int, level: float = PROTECTED
) -> Tensor:
    """Lifts the scores of the first ``sinks`` and the newest ``recent`` positions to ``level``."""
    if sinks:
        scores = torch.where(positions < sinks, level, scores)
    if recent:
        scores = torch.where(positions >= seen - recent, level, scores)
    return scores


def keep_per_head(scores: Tensor, positions: Tensor, budget: int) -> Tensor:
    """Each row keeps its best ``budget`` entries; of equal scores the older entry leaves first (DESIGN 2.5).

    Only the *values* of top-k are used: which of two equal values top-k returns differs between runtimes.

    Args:
        scores: float32 ``[rows, slots]``, all slots live.
        positions: int64 ``[rows, slots]``, distinct within a row.
        budget: entries that stay; fewer than ``slots``.

    Returns:
        bool ``[rows, slots]``, True exactly ``budget`` times per row.
    """
    leaving = scores.shape[-1] - budget
    threshold = torch.topk(scores, leaving, dim=-1, largest=False, sorted=True).values[..., -1:]
    # Everything below the threshold leaves; of those at the threshold, the oldest.
    order = torch.where(scores < threshold, -1, torch.where(scores == threshold, positions, _NEVER))
    last = torch.topk(order, leaving, dim=-1, largest=False, sorted=True).values[..., -1:]
    return order > last
