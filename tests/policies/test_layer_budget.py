"""The heads of each layer share four places, by hand; scores as in test_global_budget.py."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import Entries
from trimkv_edge.pooled_eviction import select_pooled


def test_every_layer_keeps_as_many() -> None:
    log_beta = torch.tensor([[-0.1] * 3, [-1.0] * 3, [-0.3] * 3, [-0.6] * 3])
    entries = Entries(log_beta, torch.arange(3).expand(4, -1), 3, layers=2, heads=2)
    keep = select_pooled(entries, torch.ones(4, 3, dtype=torch.bool), CacheConfig(2, 1, 1, "layer"))
    assert [row.nonzero().flatten().tolist() for row in keep] == [[0, 1, 2], [2], [0, 1, 2], [2]]
    keep = select_pooled(entries, torch.ones(4, 3, dtype=torch.bool), CacheConfig(1, 2, 1, "layer"))
    assert [row.nonzero().flatten().tolist() for row in keep] == [[1, 2], [], [1, 2], []]
