"""Retention gates decide, each KV head for itself (TRIM-KV, arXiv 2512.03324)."""

from __future__ import annotations

from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import LOG_BETA, Entries, Policy
from trimkv_edge.retention import retention_score


def retention(entries: Entries, config: CacheConfig) -> Tensor:
    """See :func:`~trimkv_edge.retention.retention_score`."""
    return retention_score(entries.log_beta, entries.positions, entries.seen, config.lookahead)


POLICY = Policy("trimkv", retention, frozenset([LOG_BETA]), source="TRIM-KV, arXiv 2512.03324")
