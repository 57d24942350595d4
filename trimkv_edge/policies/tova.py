"""What the newest query attends to stays, alike in all heads of a layer (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import WINDOW, Entries, Policy
from trimkv_edge.policies.selection import ALWAYS_KEPT, protect


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    """Attention of the last query, averaged over all query heads of the layer; the newest entry itself stays."""
    assert entries.window is not None
    newest = entries.window[:, -1]
    by_layer = newest.view(-1, entries.heads, newest.shape[-1])
    scores = by_layer.mean(1, keepdim=True).expand_as(by_layer).reshape(newest.shape)
    return protect(scores, entries.positions, entries.seen, 0, 1, ALWAYS_KEPT)


POLICY = Policy("tova", _score, frozenset([WINDOW]), window=1, source="TOVA, arXiv 2401.06104")
