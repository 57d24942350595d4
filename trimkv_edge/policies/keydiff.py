"""Keys unlike the others stay (KeyDiff, arXiv 2504.15364): the lowest cosine similarity to the mean direction."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import KEY_SCORE, Entries, Policy


def key_scores(key: Tensor) -> Tensor:
    """``-cos(key, mean of the normalised keys)``: ``[..., slots, head_dim] -> [..., slots]``."""
    key = key.to(torch.float32)
    unit = key * torch.rsqrt((key * key).sum(-1, keepdim=True) + 1e-12)
    anchor = unit.mean(-2, keepdim=True)
    length = torch.rsqrt((anchor * anchor).sum(-1) + 1e-12)
    return -(unit * anchor).sum(-1) * length


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    assert entries.key_score is not None
    return entries.key_score


POLICY = Policy(
    "keydiff",
    _score,
    frozenset([KEY_SCORE]),
    key_score=key_scores,
    scale=1.0,  # cosines are sums of terms up to 1
    source="KeyDiff, arXiv 2504.15364",
)
