"""What the newest queries attend to stays (SnapKV, arXiv 2404.14469), applied at every event instead of once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import WINDOW, Entries, Policy
from trimkv_edge.policies.selection import ALWAYS_KEPT

OBSERVED = 32  # newest queries; the paper uses 16 to 64
KERNEL = 5  # as kvpress's default; the paper's code uses 5 or 7


def in_order(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by position, and back: pooling is over neighbours in the stream, not in the slots."""
    order = positions.argsort(-1)
    return order, order.argsort(-1)


def observed(window: Tensor, order: Tensor, among_older: bool = False) -> Tensor:
    """Mean attention of the W newest queries to the entries before them, in stream order, ``[rows, slots - W]``.

    ``among_older``: each query's attention to the entries before the window adds up to 1.
    """
    older = window.gather(-1, order.unsqueeze(1).expand_as(window))[..., : -window.shape[1]]
    if among_older:
        older = older / older.sum(-1, keepdim=True).clamp(min=1e-30)
    return older.mean(1)


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    """Attention of the window, averaged over a kernel of neighbours (as kvpress; the paper takes their maximum). The
    window's own entries stay, if the budget holds them."""
    assert entries.window is not None
    order, back = in_order(entries.positions)
    pooled = F.avg_pool1d(observed(entries.window, order), KERNEL, stride=1, padding=KERNEL // 2)
    kept = torch.full_like(pooled[:, :1], ALWAYS_KEPT).expand(-1, entries.window.shape[1])
    return torch.cat([pooled, kept], -1).gather(-1, back)


POLICY = Policy("snapkv", _score, frozenset([WINDOW]), window=OBSERVED, source="SnapKV, arXiv 2404.14469")
