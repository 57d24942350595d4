"""Retention gates decide, and the heads of a layer share its budget: every layer holds the same number of entries."""

from __future__ import annotations

from trimkv_edge.policies.base import LAYER, LOG_BETA, Policy
from trimkv_edge.policies.trimkv import retention

POLICY = Policy("layer", retention, frozenset([LOG_BETA]), scope=LAYER, source="per-layer form of DBTrimKV")
