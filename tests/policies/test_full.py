"""The full cache never evicts, and says what to do when it is full."""

from __future__ import annotations

import pytest
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError
from trimkv_edge.models.eager import EagerEngine


def test_a_full_cache_holds_everything_and_refuses_to_evict() -> None:
    engine = EagerEngine(gated_model("qwen3-gqa"), CacheConfig(8, 4, 4, "full"))
    tokens = random_tokens(12)
    for start in range(0, 12, 4):
        engine.prefill(tokens[start : start + 4])
    with pytest.raises(BudgetError, match=r"12 entries per head.*raise the budget"):
        engine.evict()
    assert engine.live == 12
    assert engine.survivors().tolist() == [[list(range(12))] * 2] * 2
