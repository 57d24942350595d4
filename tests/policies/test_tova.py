"""The last query's attention, one ranking for all heads of a layer."""

from __future__ import annotations

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import select_survivors
from trimkv_edge.policies.base import Entries


def test_heads_of_a_layer_share_their_mean() -> None:
    # Two layers of two heads; the newest entry (position 3) stays, though it receives nothing.
    window = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.0, 0.8, 0.2, 0.0], [0.1, 0.3, 0.6, 0.0], [0.1, 0.1, 0.8, 0.0]])
    entries = Entries(torch.zeros(4, 4), torch.arange(4).expand(4, -1), 4, 2, 2, window=window[:, None])
    keep = select_survivors(entries, CacheConfig(2, 2, 2, "tova"))
    # Means: layer 0 gives 0.35, 0.45, 0.2; layer 1 gives 0.1, 0.2, 0.7.
    assert keep.tolist() == [[False, True, False, True]] * 2 + [[False, False, True, True]] * 2
