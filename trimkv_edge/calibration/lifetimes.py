"""Which entries lived through which events: what two runs of a shared budget are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.pool import PooledCache


class Lifetimes:
    """How long each token of each row (layer, KV head) was kept.

    A token that an event dropped never comes back, so one number per token says at which events it was there.

    Attributes:
        lasted: int32 ``[streams, rows, tokens]``: number of the last event that the token survived, from 1; 0 if none.
        seen: tokens read at each event; event n is ``seen[n - 1]``.
    """

    def __init__(self, streams: int, rows: int, tokens: int) -> None:
        self.lasted = torch.zeros(streams, rows, tokens, dtype=torch.int32)
        self.seen: list[int] = []

    def note(self, cache: PooledCache) -> None:
        """Takes down who is left, right after an event."""
        self.seen.append(cache.seen)
        kept = cache.kept.flatten(1)
        places = cache.places(int(kept.max())).flatten(1, 2)
        sequence, row, slot = (torch.arange(places.shape[-1]) < kept.unsqueeze(-1)).nonzero(as_tuple=True)
        positions = cache.positions[sequence, places[sequence, row, slot]]
        self.lasted[sequence, row, positions] = len(self.seen)


def full_events(seen: list[int], config: CacheConfig) -> list[int]:
    """Numbers of the events at which the pool was full: the only ones at which the shared budget decides."""
    return [number for number, tokens in enumerate(seen, 1) if tokens >= config.slots]


def agreement(exact: Lifetimes, other: Lifetimes, config: CacheConfig) -> Tensor:
    """Share of the exact policy's survivors that the other run holds too, float64 ``[full events, streams]``.

    Where the exact policy keeps nothing (a threshold can do that), there is nothing to miss: 1.
    """
    both = torch.minimum(exact.lasted, other.lasted)
    shares = []
    for number in full_events(exact.seen, config):
        born = exact.seen[number - 1]
        wanted, held = ((lasted[..., :born] >= number).sum((1, 2)) for lasted in (exact.lasted, both))
        shares.append(torch.where(wanted > 0, held.double() / wanted.clamp(min=1), 1.0))
    return torch.stack(shares)
