"""Redundant keys leave before rare ones; of what is alike the newest is spared."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import select_survivors
from trimkv_edge.policies.base import Entries


def test_of_four_alike_the_newest_stays() -> None:
    key = torch.eye(8)
    key[0] = key[2] = key[3] = key[5]  # old entries 0, 2, 3 and 5 are one key; 6 and 7 are the window
    order = torch.tensor([6, 3, 1, 0, 7, 5, 4, 2])
    window = torch.full((1, 2, 8), 0.125)
    entries = Entries(torch.zeros(1, 8), order[None], 8, key=key[order][None], window=window)
    keep = select_survivors(entries, CacheConfig(5, 3, 2, "r-kv"))
    assert sorted(order[keep[0]].tolist()) == [1, 4, 5, 6, 7]


def test_importance_decides_between_unlike_keys() -> None:
    attention = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.05, 0.05])
    entries = Entries(
        torch.zeros(1, 11), torch.arange(11)[None], 11, key=torch.eye(11)[None], window=attention.expand(1, 2, -1)
    )
    keep = select_survivors(entries, CacheConfig(7, 4, 4, "r-kv"))
    # The kernel of seven reaches three entries to either side of 5; of those alike in score the oldest leaves.
    assert torch.arange(11)[keep[0]].tolist() == [4, 5, 6, 7, 8, 9, 10]
