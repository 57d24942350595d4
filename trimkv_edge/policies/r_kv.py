"""Important and not redundant entries stay (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import KEY, WINDOW, Entries, Policy
from trimkv_edge.policies.selection import ALWAYS_KEPT
from trimkv_edge.policies.snapkv import in_order, observed

# The published settings.
OBSERVED = 8
KERNEL = 7
SIMILAR = 0.5  # cosine above which two keys count as alike
IMPORTANCE = 0.1  # lambda, the weight of importance; redundancy has the rest
_ROWS = 8


def _redundancy(key: Tensor) -> Tensor:
    """How much an entry is like the others, ``[rows, slots, head_dim]`` in stream order -> ``[rows, slots]``.

    Mean cosine similarity, a softmax over the entries. Of the entries that are alike to another one, the most recent
    is not charged for it, so that one of them stays; where none is alike, the oldest is spared, as in the published
    code.
    """
    unit = F.normalize(key.float(), dim=-1)
    alike = unit @ unit.transpose(-1, -2)
    slots = key.shape[1]
    alike = alike.masked_fill(torch.eye(slots, dtype=torch.bool, device=key.device), 0.0)
    place = torch.arange(slots, device=key.device)
    last = torch.where(alike > SIMILAR, place, 0).amax(-1, keepdim=True)
    return alike.scatter(-1, last, 0.0).mean(1).softmax(-1)


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    """``0.1 * importance - 0.9 * redundancy``; importance is the window's attention to older entries, its maximum over
    a kernel. The authors' code takes the largest logit of the group's query heads; here their attention is averaged."""
    assert entries.window is not None
    assert entries.key is not None
    order, back = in_order(entries.positions)
    width = entries.window.shape[1]
    importance = F.max_pool1d(observed(entries.window, order, among_older=True), KERNEL, stride=1, padding=KERNEL // 2)
    ordered = entries.key.gather(1, order.unsqueeze(-1).expand_as(entries.key))
    # A few rows at a time: their similarities are slots x slots.
    redundancy = torch.cat([_redundancy(rows) for rows in ordered.split(_ROWS)])
    score = IMPORTANCE * importance - (1 - IMPORTANCE) * redundancy[:, :-width]
    kept = torch.full_like(score[:, :1], ALWAYS_KEPT).expand(-1, width)
    return torch.cat([score, kept], -1).gather(-1, back)


POLICY = Policy("r-kv", _score, frozenset([WINDOW, KEY]), window=OBSERVED, source="R-KV, arXiv 2505.24133")
