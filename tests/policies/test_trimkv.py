"""Retention scores by hand: s = log_beta * (n + 1 - position), each head for itself."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import select_survivors
from trimkv_edge.policies.base import Entries


def test_each_head_keeps_its_best() -> None:
    # Ages 5, 4, 3, 2. First head: -0.5, -4, -0.3, -2. Second: -5, -0.4, -3, -0.2.
    log_beta = torch.tensor([[-0.1, -1.0, -0.1, -1.0], [-1.0, -0.1, -1.0, -0.1]])
    entries = Entries(log_beta, torch.arange(4).expand(2, -1), 4, heads=2)
    keep = select_survivors(entries, CacheConfig(2, 2, 2, "trimkv"))
    assert keep.tolist() == [[True, False, True, False], [False, True, False, True]]
