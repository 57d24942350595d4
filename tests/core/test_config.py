"""Every value that a cache cannot have is refused with a message that names it and the way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError, TrimKVError

LOWEST = {"budget": 1, "buffer": 1, "prefill_chunk": 1, "sinks": 0, "recent": 0, "lookahead": 1}


@pytest.mark.parametrize("name", LOWEST)
@pytest.mark.parametrize("value", [-1, 1.0, 2.5, "8", None, True, np.float32(4)])
def test_not_a_count(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**{"budget": 256, name: value})
    assert str(caught.value) == f"{name} is {value!r}, but must be an integer >= {LOWEST[name]}"


@pytest.mark.parametrize("name", ["budget", "buffer", "prefill_chunk", "lookahead"])
def test_zero_is_too_few(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0, but must be an integer >= 1"):
        CacheConfig(**{"budget": 256, name: 0})


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ((64, 16, 17), ConfigError, ["17", "16", "--prefill-chunk", "--buffer"]),
        ((15, 16, 16), BudgetError, ["15", "16", "--budget", "--prefill-chunk"]),
        ((64, 16, 16, "trimkv", 60, 5), BudgetError, ["60", "5", "64", "--budget"]),
        ((64, 16, 16, "trimkv", 65), BudgetError, ["65", "64", "--budget"]),
    ],
)
def test_contradictions(settings: tuple[Any, ...], error: type[TrimKVError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        CacheConfig(*settings)
    message = str(caught.value)
    assert all(part in message for part in parts)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "slots"),
    [((1, 1, 1), 2), ((16, 16, 16), 32), ((2048,), 2176), ((8, 16, 8), 24), ((8, 4, 4, "trimkv", 3, 5), 12)],
)
def test_valid_edges(settings: tuple[Any, ...], slots: int) -> None:
    assert CacheConfig(*settings).slots == slots


def test_published_defaults_and_frozen() -> None:
    config = CacheConfig(512)
    assert (config.sinks, config.recent, config.lookahead, config.policy) == (0, 0, 1, "trimkv")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 4  # type: ignore[misc]
