"""A fixed, even sample of the stream, different in every head."""

from __future__ import annotations

import torch

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import Entries


def rank(row: int, position: int) -> int:
    """The hash in Python's own integers."""
    prime = 2**31 - 1
    x = ((position + 1) * 48271 + (row + 1) * 1_664_525) % prime
    x = (x * x + 69_621) % prime
    x = (x * x + x) % prime
    return x % 2**24


def test_ranks_are_exact_to_the_last_position() -> None:
    positions = torch.tensor([[0, 1, 77, 2**24 - 1]]).expand(6, -1)
    entries = Entries(torch.zeros(6, 4), positions, 2**24, layers=1, heads=3)
    got = POLICIES["random"].score(entries, CacheConfig(2, 2, 2, "random"))
    # The second batch row repeats the first.
    assert got.long().tolist() == [[rank(row % 3, p) for p in positions[0].tolist()] for row in range(6)]


def test_the_kept_are_spread_evenly_over_the_stream() -> None:
    config = CacheConfig(16, 16, 16, "random")
    cache = StaticCache(config, 32, 8, 2)
    rows = torch.zeros(1, 8, 16, 2)
    for _ in range(32):
        for layer in range(32):
            cache.attend(layer, rows, rows, rows, 1.0)
        cache.advance(16)
        if cache.live == 32:
            cache.evict()
    counts = torch.histc(cache.positions[..., :16].double(), 8, 0, 512)
    # 4,096 draws in 8 bins: 512 each; six standard deviations are 127.
    assert counts.sum() == 4096
    assert (counts - 512).abs().max() < 127
    assert len({tuple(sorted(head)) for head in cache.positions[0, :, :, :16].flatten(0, 1).tolist()}) > 250
