"""Two layers of two heads share eight places, by hand: s = log_beta * (n + 1 - position)."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import Entries
from trimkv_edge.pooled_eviction import select_pooled

# Ages 4, 3, 2. Scores: -0.4 -0.3 -0.2 | -4 -3 -2 | -1.2 -0.9 -0.6 | -2.4 -1.8 -1.2 (the last head's are -0.6 each).
LOG_BETA = torch.tensor([[-0.1] * 3, [-1.0] * 3, [-0.3] * 3, [-0.6] * 3])
ENTRIES = Entries(LOG_BETA, torch.arange(3).expand(4, -1), 3, layers=2, heads=2)
LIVE = torch.ones(4, 3, dtype=torch.bool)


def kept(**settings: object) -> list[list[int]]:
    config = CacheConfig(**{"budget": 2, "buffer": 1, "prefill_chunk": 1, "policy": "global", **settings})
    return [row.nonzero().flatten().tolist() for row in select_pooled(ENTRIES, LIVE, config)]


def test_the_best_of_all_layers_and_heads_stay() -> None:
    # -1.2 stands twice at the edge: position 0 of the third head and position 2 of the last; 8 places hold both.
    assert kept() == [[0, 1, 2], [], [0, 1, 2], [1, 2]]


def test_a_floor_comes_out_of_what_others_would_keep() -> None:
    assert kept(min_per_head=1) == [[0, 1, 2], [2], [0, 1, 2], [2]]
    assert kept(min_per_head=2) == [[1, 2]] * 4


def test_caps_free_places_for_others() -> None:
    assert kept(caps=((2, 2), (2, 2))) == [[1, 2]] * 4
    assert kept(caps=((2, 3), (3, 3))) == [[1, 2], [2], [0, 1, 2], [1, 2]]


def test_a_threshold_leaves_places_empty() -> None:
    # log 0.5 = -0.69: what is below leaves, though there is room.
    assert kept(threshold=0.5) == [[0, 1, 2], [], [2], []]
    assert kept(threshold=0.5, min_per_head=1, recent=1) == [[0, 1, 2], [2], [2], [2]]


def test_protected_entries_outlive_better_ones() -> None:
    assert kept(sinks=1) == [[0, 1, 2], [0], [0, 1, 2], [0]]
