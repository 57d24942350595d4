"""Attention sinks and a window (StreamingLLM, arXiv 2309.17453): the newest stay, and the ``sinks`` of the settings."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.policies.base import Entries, Policy

_SINKS = 4  # as published


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    return entries.positions.to(torch.float32)  # exact below 2^24, where streams end


POLICY = Policy("streaming", _score, sinks=_SINKS, scale=0.0, source="StreamingLLM, arXiv 2309.17453")
