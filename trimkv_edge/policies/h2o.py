"""Heavy hitters (H2O, arXiv 2306.14048): half of the budget is recent, the rest received most attention so far."""

from __future__ import annotations

from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import MASS, Entries, Policy
from trimkv_edge.policies.selection import ALWAYS_KEPT, protect


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    """Accumulated attention of the group's query heads, as published.

    It is not divided by the number of queries that saw the entry (as kvpress's ObservedAttention does), so it favours
    old entries, which the recent half balances. Of an odd budget the heavy half is the larger.
    """
    assert entries.mass is not None
    return protect(entries.mass, entries.positions, entries.seen, 0, config.budget // 2, ALWAYS_KEPT)


POLICY = Policy("h2o", _score, frozenset([MASS]), source="H2O, arXiv 2306.14048")
