"""Half of the budget for heavy hitters, half for the newest."""

from __future__ import annotations

import pytest
import torch
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.eviction import select_survivors
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.policies.base import Entries

MASS = [5.0, 1.0, 4.0, 3.0, 2.0, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    ("budget", "sinks", "recent", "kept"),
    [
        (4, 0, 0, [0, 2, 6, 7]),
        (5, 0, 0, [0, 2, 3, 6, 7]),  # of an odd budget the heavy half is the larger
        (1, 0, 0, [0]),
        (4, 2, 0, [0, 1, 6, 7]),
        (4, 0, 3, [0, 5, 6, 7]),
        (4, 4, 0, [0, 1, 2, 3]),  # what the settings protect comes before the recent half
    ],
)
def test_hand_written(budget: int, sinks: int, recent: int, kept: list[int]) -> None:
    config = CacheConfig(budget, 8 - budget, 1, "h2o", sinks=sinks, recent=recent)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    entries = Entries(torch.zeros(1, 8), order[None], 8, mass=torch.tensor(MASS)[order][None])
    keep = select_survivors(entries, config)
    assert sorted(order[keep[0]].tolist()) == kept


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "r-kv", "tova"])
def test_a_state_without_the_attention_of_the_past_is_refused(policy: str) -> None:
    engine = EagerEngine(gated_model("qwen3-gqa"), CacheConfig(8, 4, 4, policy))
    engine.prefill(random_tokens(4))
    state = engine.state()
    with pytest.raises(StateError, match=f"policy {policy} needs the attention of the past.*read the stream again"):
        engine.load_state(state)
    assert engine.live == 4
    engine.prefill(random_tokens(4))
