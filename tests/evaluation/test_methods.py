"""Methods as users write them."""

from __future__ import annotations

import pytest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.methods import Method


@pytest.mark.parametrize(
    "text",
    ["full", "trimkv:rg10", "streaming", "global:rg10:min-per-head=25%", "layer:threshold=0.1", "trimkv:C:/a/b=1.st"],
)
def test_label_gives_the_method_back(text: str) -> None:
    assert Method.parse(text).label == text
    assert Method.parse(Method.parse(text).label) == Method.parse(text)


def test_settings() -> None:
    shared = Method.parse("global:rg10:min-per-head=25%:threshold=0.1")
    assert (shared.policy, shared.gates) == ("global", "rg10")
    assert shared.config(4096, 64, 32, 4) == CacheConfig(
        64, 32, 32, "global", lookahead=4, min_per_head=16, threshold=0.1
    )
    assert Method.parse("layer:min-per-head=3").config(4096, 64, 32).min_per_head == 3
    assert Method.parse("streaming").config(4096, 64, 32, 4) == CacheConfig(64, 32, 32, "streaming", sinks=4)
    assert Method.parse("full").config(100, 64, 32) == CacheConfig(100, 32, 32, "full")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("newest:rg", "'newest' is not known"),
        ("trimkv:rg:min-per-head=4", "not for trimkv"),
        ("global:threshold=high", "'high' is not a number"),
        ("global:threshold=2", "threshold is 2.0"),
        ("global:min-per-head=half", "budget 'half'"),
    ],
)
def test_bad_methods_are_refused_before_anything_runs(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Method.parse(text)
