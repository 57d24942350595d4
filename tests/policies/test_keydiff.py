"""The key least like the others stays; lengths of keys do not count."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import select_survivors
from trimkv_edge.policies.base import Entries
from trimkv_edge.policies.keydiff import key_scores


def test_scores_of_three_keys() -> None:
    key = torch.tensor([[5.0, 0.0], [0.0, 0.1], [2.0, 0.0]])
    # Directions (1, 0), (0, 1), (1, 0): their mean is along (2, 1).
    want = torch.tensor([-2.0, -1.0, -2.0]) / 5**0.5
    torch.testing.assert_close(key_scores(key), want)


def test_the_odd_ones_stay() -> None:
    key = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [1.0, 0.0], [0.0, 9.0], [1.0, 0.2]])
    entries = Entries(torch.zeros(1, 6), torch.arange(6)[None], 6, key_score=key_scores(key)[None])
    keep = select_survivors(entries, CacheConfig(2, 4, 2, "keydiff"))
    assert torch.arange(6)[keep[0]].tolist() == [2, 4]


def test_keys_of_zeros_are_finite() -> None:
    assert key_scores(torch.zeros(4, 3)).isfinite().all()
