"""Sinks and a window, at every length of a stream."""

from __future__ import annotations

import pytest
from factories import gated_model, random_tokens
from onnx_artefact import feed

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.eager import EagerEngine


@pytest.mark.parametrize("sinks", [0, 4])
def test_the_first_and_the_newest_stay(sinks: int) -> None:
    engine = EagerEngine(gated_model("qwen3-gqa"), CacheConfig(10, 5, 5, "streaming", sinks=sinks))
    for seen in (15, 35, 50):
        feed(engine, random_tokens(seen - engine.seen), (5,))
        engine.evict()
        want = [*range(sinks), *range(seen - 10 + sinks, seen)]
        assert all(sorted(row) == want for row in engine.survivors().reshape(4, -1).tolist())
