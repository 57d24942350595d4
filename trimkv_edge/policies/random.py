"""A uniform random sample of the stream: each (head, position) has a fixed rank, and the best ranks stay."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import Entries, Policy

_PRIME = 2**31 - 1
_A, _B, _C = 48271, 1_664_525, 69_621  # multipliers of well-known congruential generators
_BITS = 2**24


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    """A hash in integers, so that every runtime ranks alike; its low 24 bits are exact in float32."""
    rows = torch.arange(entries.layers * entries.heads, dtype=torch.int64, device=entries.positions.device)
    row = rows.repeat(entries.positions.shape[0] // (entries.layers * entries.heads)).unsqueeze(1)
    mixed = ((entries.positions + 1) * _A + (row + 1) * _B) % _PRIME
    mixed = (mixed * mixed + _C) % _PRIME
    mixed = (mixed * mixed + mixed) % _PRIME
    return (mixed % _BITS).to(torch.float32)


POLICY = Policy("random", _score, scale=0.0)
