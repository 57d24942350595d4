"""Eviction policies as pure functions on scores, written in ops that every target has (DESIGN sections 2 and 3).

A policy says who stays: a boolean mask over ``[rows, slots]``, one row per (layer, KV head). ``plan_moves`` turns the
mask into the at most B row moves per head that keep the survivors in the live prefix ``[0, M)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.retention import retention_score

_PROTECTED = 3.0e38
_NEVER = torch.iinfo(torch.int64).max


def protect(scores: Tensor, positions: Tensor, seen: Tensor | int, sinks: int, recent: int) -> Tensor:
    """Lifts the scores of the first ``sinks`` and the newest ``recent`` positions above every other."""
    if sinks:
        scores = torch.where(positions < sinks, _PROTECTED, scores)
    if recent:
        scores = torch.where(positions >= seen - recent, _PROTECTED, scores)
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


PolicyFn = Callable[[Tensor, Tensor, int], Tensor]

POLICIES: dict[str, PolicyFn] = {
    "per-head": keep_per_head,
}


def select_survivors(log_beta: Tensor, positions: Tensor, seen: Tensor | int, config: CacheConfig) -> Tensor:
    """Who stays at an eviction event.

    Args:
        log_beta: float32 ``[rows, slots]``; rows = layers x KV heads (row = layer * H + head), all slots live.
        positions: int64 ``[rows, slots]``.
        seen: tokens read so far, an int or an int64 tensor that broadcasts.
        config: budget, protection, look-ahead and the policy's name.

    Returns:
        bool ``[rows, slots]``. A policy that ranks across rows may keep a different number in each row.

    Raises:
        ConfigError: unknown policy.
    """
    policy = POLICIES.get(config.policy)
    if policy is None:
        raise ConfigError(f"policy {config.policy!r} is not known; use one of {', '.join(POLICIES)}")
    scores = retention_score(log_beta, positions, seen, config.lookahead)
    scores = protect(scores, positions, seen, config.sinks, config.recent)
    return policy(scores, positions, config.budget)


def plan_moves(keep: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Row moves that bring the survivors into ``[0, budget)``.

    The holes of the prefix, in slot order, are filled with the surviving ring entries, in slot order. Both lists have
    static length B: their tails coincide (each leftover ring slot is moved onto itself), so no count is needed.

    Args:
        keep: bool ``[rows, slots]`` with exactly ``budget`` True per row.

    Returns:
        ``(destination, source)``, int64 ``[rows, slots - budget]`` slot indices.
    """
    slots = keep.shape[-1]
    buffer = slots - budget
    slot = torch.arange(slots, dtype=torch.int64, device=keep.device)
    victims_first = slot + keep.to(torch.int64) * slots
    destination = torch.topk(victims_first, buffer, dim=-1, largest=False, sorted=True).values
    survivors_first = slot[budget:] + (~keep[..., budget:]).to(torch.int64) * slots
    ordered = torch.topk(survivors_first, buffer, dim=-1, largest=False, sorted=True).values
    return destination, torch.where(ordered >= slots, ordered - slots, ordered)


def event_positions(kept: Tensor, seen: Tensor, buffer: int) -> Tensor:
    """Positions of all slots at an eviction event; graphs store those of the kept prefix only.

    The ring always holds the newest ``buffer`` tokens, in order and alike in every row, so its positions need no state
    and no write per step.

    Args:
        kept: int64 ``[rows, budget]``; ``arange(budget)`` before the first event.
        seen: int64 ``[1]``, tokens read so far.

    Returns:
        int64 ``[rows, budget + buffer]``.
    """
    ring = seen - buffer + torch.arange(buffer, dtype=torch.int64, device=kept.device)
    return torch.cat([kept, ring.unsqueeze(0).expand(kept.shape[0], -1)], dim=-1)
