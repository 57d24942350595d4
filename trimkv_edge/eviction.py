"""Eviction as pure functions, written in ops that every target has (docs/design.md).

A policy says who stays: a boolean mask over ``[rows, slots]``, one row per (layer, KV head). ``plan_moves`` turns the
mask into the at most B row moves per head that keep the survivors in the live prefix ``[0, M)``. For budgets that heads
share see :mod:`trimkv_edge.pooled_eviction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import LOG_BETA, Entries, Policy
from trimkv_edge.policies.selection import keep_per_head, protect


def find_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"policy {name!r} is not known; use one of {', '.join(POLICIES)}")
    return policy


def pooled_policies() -> str:
    """Names of the policies whose heads share a budget, for messages."""
    return ", ".join(name for name, policy in POLICIES.items() if policy.pooled)


def policy_of(config: CacheConfig) -> Policy:
    """The policy of a cache whose other settings it can honour.

    Raises:
        ConfigError: the policy is not known, look-ahead is asked of one that does not read retention gates, or
            settings of a shared budget of one that has none.
    """
    policy = find_policy(config.policy)
    if config.lookahead != 1 and LOG_BETA not in policy.reads:
        raise ConfigError(
            f"lookahead is {config.lookahead}, but policy {policy.name} does not score by retention: use lookahead 1"
        )
    for name in ("min_per_head", "threshold", "caps"):
        if getattr(config, name) and not policy.pooled:
            raise ConfigError(
                f"{name.replace('_', ' ')} is for policies whose heads share a budget ({pooled_policies()}), "
                f"not for {policy.name}: leave it out or change --policy"
            )
    return policy


def check_caps(config: CacheConfig, layers: int, heads: int) -> None:
    """Raises :class:`ConfigError` if the caps are those of another model."""
    caps = config.caps
    if caps is not None and (len(caps), len(caps[0])) != (layers, heads):
        raise ConfigError(
            f"the caps are for {len(caps)} layers x {len(caps[0])} KV heads, but the model has {layers} x {heads}: "
            "calibrate them for this model"
        )


def require_exportable(config: CacheConfig, layers: int, heads: int) -> None:
    """Whether graphs can hold these settings.

    Raises:
        ConfigError: a policy that only the eager engine runs, look-ahead, a shared budget without caps, or caps of
            another model.
    """
    policy = policy_of(config)
    if not policy.exports:
        able = ", ".join(name for name, policy in POLICIES.items() if policy.exports)
        raise ConfigError(f"policy {policy.name!r} runs in the eager engine only: export one of {able}")
    if config.lookahead != 1:
        raise ConfigError(
            f"lookahead is {config.lookahead}, but graphs hold the single-step score only: use lookahead 1"
        )
    if policy.pooled and config.caps is None:
        raise ConfigError(
            f"policy {policy.name} has heads of changing lengths, and graphs need a cap for each: calibrate them"
        )
    check_caps(config, layers, heads)


def score_entries(entries: Entries, config: CacheConfig) -> Tensor:
    """The policy's scores with ``sinks`` and ``recent`` lifted above all others, float32 ``[rows, slots]``."""
    scores = find_policy(config.policy).score(entries, config)
    return protect(scores, entries.positions, entries.seen, config.sinks, config.recent)


def select_survivors(entries: Entries, config: CacheConfig) -> Tensor:
    """Who stays at an eviction event where each head has its own budget.

    Args:
        entries: what is live; rows = layers x KV heads (row = layer * H + head).
        config: budget, protection, look-ahead and the policy's name.

    Returns:
        bool ``[rows, slots]``, True exactly ``budget`` times per row.

    Raises:
        ConfigError: unknown policy.
    """
    return keep_per_head(score_entries(entries, config), entries.positions, config.budget)


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
