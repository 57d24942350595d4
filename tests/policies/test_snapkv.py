"""Pooling is over neighbours in the stream, wherever their slots are."""

from __future__ import annotations

from dataclasses import replace

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import score_entries, select_survivors
from trimkv_edge.policies.base import Entries

# Positions 10, 20, ..., 80 and a window of two; 40 alone is looked at.
POSITIONS = torch.tensor([10, 20, 30, 40, 50, 60, 70, 80, 90, 91])
ATTENTION = torch.tensor([0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0, 0.1, 0.2, 0.1])
POOLED = [0.0, 0.12, 0.12, 0.12, 0.12, 0.14, 0.02, 0.02]


def entries(order: torch.Tensor) -> Entries:
    window = torch.stack([ATTENTION * 0.5, ATTENTION * 1.5])[:, order]
    return Entries(torch.zeros(1, 10), POSITIONS[order][None], 92, window=window[None])


def test_pooled_scores_follow_positions_not_slots() -> None:
    config = CacheConfig(5, 2, 2, "snapkv")
    for seed in range(5):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        scores = score_entries(entries(order), config)[0]
        by_position = scores[order.argsort()]
        torch.testing.assert_close(by_position[:8], torch.tensor(POOLED))
        assert (by_position[8:] > 1e30).all()


def test_the_window_and_the_neighbours_of_what_is_looked_at_stay() -> None:
    order = torch.tensor([9, 3, 0, 8, 1, 7, 2, 4, 5, 6])
    keep = select_survivors(entries(order), CacheConfig(7, 3, 3, "snapkv"))
    assert sorted(POSITIONS[order][keep[0]].tolist()) == [20, 30, 40, 50, 60, 90, 91]


def test_sinks_stay_even_if_the_window_fills_the_budget() -> None:
    moved = replace(entries(torch.arange(10)), positions=(POSITIONS - 10)[None])
    keep = select_survivors(moved, CacheConfig(2, 8, 2, "snapkv", sinks=1))
    assert POSITIONS[keep[0]].tolist() == [10, 91]
