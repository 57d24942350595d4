"""Retention gates decide, and all layers and heads share one budget (DBTrimKV, arXiv 2605.09649)."""

from __future__ import annotations

from trimkv_edge.policies.base import LOG_BETA, MODEL, Policy
from trimkv_edge.policies.trimkv import retention

POLICY = Policy("global", retention, frozenset([LOG_BETA]), scope=MODEL, source="DBTrimKV, arXiv 2605.09649")
