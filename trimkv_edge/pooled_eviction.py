"""The eviction event where heads share a budget, as pure functions in ops that every target has.

Every row (layer, KV head) holds its own number of entries in a prefix of its slots, new ones behind the kept ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import find_policy, score_entries
from trimkv_edge.policies.base import MODEL, Entries
from trimkv_edge.policies.pooling import drop_excess, keep_best
from trimkv_edge.policies.selection import PROTECTED

# Above what the settings protect, so that a head's floor holds whatever else is protected.
_FLOOR = 3.2e38


def select_pooled(entries: Entries, valid: Tensor, config: CacheConfig) -> Tensor:
    """Who stays at an eviction event where heads share a budget (DBTrimKV, arXiv 2605.09649).

    In this order: what exceeds a head's cap leaves, then what is below the threshold, then all but the best
    ``budget * heads`` of each layer or ``budget * layers * heads`` of all. A head's best ``min_per_head`` and what
    ``sinks`` and ``recent`` protect outlive the rest. Of equal scores the older leaves first, then lower (layer, head).

    Args:
        entries: rows of a sequence are layers x KV heads (row = layer * H + head); slots may be dead.
        valid: bool ``[rows, slots]``: which are live.
        config: the settings, caps included.

    Returns:
        bool ``[rows, slots]``; each row keeps its own number.
    """
    slots = entries.positions.shape[-1]
    rows = entries.layers * entries.heads
    caps = None
    if config.caps is not None:
        caps = torch.tensor(config.caps, dtype=torch.int64, device=valid.device).reshape(-1, 1)
        caps = caps.repeat(valid.shape[0] // rows, 1)
    scores, valid = contenders(entries, valid, caps, config)
    group = rows if find_policy(config.policy).scope == MODEL else entries.heads
    row = torch.arange(group, dtype=torch.int64, device=scores.device).view(1, group, 1)
    order = entries.positions.view(-1, group, slots) * group + row
    flat = (-1, group * slots)
    keep = keep_best(scores.view(flat), order.view(flat), valid.reshape(flat), config.budget * group)
    return keep.view(valid.shape)


def contenders(entries: Entries, valid: Tensor, caps: Tensor | None, config: CacheConfig) -> tuple[Tensor, Tensor]:
    """What each row does by itself: scores with its floor lifted, and what cap and threshold leave of it.

    Args:
        entries, valid: as in :func:`select_pooled`.
        caps: int64 ``[rows, 1]``.
    """
    scores = torch.where(valid, score_entries(entries, config), -PROTECTED)
    if config.min_per_head:
        lifted = keep_best(scores, entries.positions, valid, config.min_per_head)
        scores = torch.where(lifted, _FLOOR, scores)
    if caps is not None:
        valid = drop_excess(scores, entries.positions, valid, caps, config.buffer)
    if config.threshold:
        valid = valid & (scores >= math.log(config.threshold))
    return scores, valid


def holes_and_movers(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What to move so that the survivors of each row fill a prefix of its slots.

    Args:
        keep: bool ``[rows, slots]``.

    Returns:
        ``(holes, movers, lengths)``: slots of the prefix to fill and slots to fill them from, bool ``[rows, slots]``,
        as many in each row and paired in slot order; survivors of each row, int64 ``[rows, 1]``.
    """
    lengths = keep.to(torch.int64).sum(-1, keepdim=True)
    inside = torch.arange(keep.shape[-1], dtype=torch.int64, device=keep.device) < lengths
    return inside & ~keep, keep & ~inside, lengths


def ragged_positions(kept: Tensor, lengths: Tensor, seen: Tensor, fill: Tensor, slots: int) -> Tensor:
    """Positions of all slots; graphs store those of kept entries only, since a ring holds the newest tokens in order.

    Args:
        kept: int64 ``[rows, most]``, of which row r's first ``lengths[r]`` count.
        lengths: int64 ``[rows, 1]``.
        seen, fill: int64 ``[1]``, tokens read so far, and since the last event.
        slots: columns of the result.

    Returns:
        int64 ``[rows, slots]``; dead slots have numbers without meaning.
    """
    slot = torch.arange(slots, dtype=torch.int64, device=kept.device)
    ring = seen - fill + slot - lengths
    return ring + (slot < lengths).to(torch.int64) * (widened(kept, slots) - ring)


def widened(table: Tensor, columns: int) -> Tensor:
    """``[rows, n]`` with zeros behind, up to ``columns``. Joined: ONNX Runtime's CUDA does not pad integers."""
    missing = columns - table.shape[1]
    return table if missing <= 0 else torch.cat([table, table.new_zeros(table.shape[0], missing)], dim=1)


def by_rank(marked: Tensor, count: int, default: Tensor) -> Tensor:
    """The marked slots of each row in slot order, then ``default``.

    Args:
        marked: bool ``[rows, slots]``, True at most ``count`` times per row.
        count: columns of the result.
        default: int64 ``[rows, 1]``.

    Returns:
        int64 ``[rows, count]``.
    """
    rank = torch.cumsum(marked.to(torch.int64), dim=-1) - 1
    slot = torch.arange(marked.shape[-1], dtype=torch.int64, device=marked.device).expand(marked.shape[0], -1)
    # One more column takes what is not marked.
    table = (default + torch.zeros(1, count + 1, dtype=torch.int64, device=marked.device)).contiguous()
    place = count + marked.to(torch.int64) * (rank - count)
    return table.scatter(1, place, slot)[:, :count]


def origins(holes: Tensor, movers: Tensor) -> Tensor:
    """For each slot, the slot that its entry comes from: its own unless it is a hole. int64 ``[rows, slots]``."""
    slot = torch.arange(holes.shape[-1], dtype=torch.int64, device=holes.device).expand(holes.shape[0], -1)
    sources = by_rank(movers, holes.shape[-1], torch.zeros_like(slot[:, :1]))
    rank = torch.cumsum(holes.to(torch.int64), dim=-1) - 1
    return torch.where(holes, sources.gather(1, rank.clamp(min=0)), slot)
