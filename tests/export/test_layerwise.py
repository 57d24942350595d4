"""The layer-by-layer reference plays back exactly what the eager engine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.export.layerwise import LayerwiseReference
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights, exact
from trimkv_edge.export.verify import stream_plan
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.skeleton import hollow, model_weights

CONFIG = CacheConfig(budget=20, buffer=8, prefill_chunk=8)
PLAN = stream_plan(20, 8, 8, singles=5)


def playback(kind: str, config: CacheConfig, folder: Path) -> tuple[EagerEngine, LayerwiseReference, list[int]]:
    real, empty = gated_model(kind), gated_model(kind)
    weights = model_weights(real)
    hollow(empty)
    tokens = random_tokens(sum(PLAN), seed=2)
    source = ReferenceWeights(empty, weights, SCHEMES["none"], exact)
    return EagerEngine(real, config), LayerwiseReference(source, config, tokens, PLAN, folder), tokens


def test_the_plan_ends_with_a_few_single_tokens_after_five_events() -> None:
    assert PLAN[-5:] == [1] * 5
    assert sum(PLAN[:-5]) == 20 + 5 * 8
    assert max(PLAN) == 8


@pytest.mark.parametrize(
    ("kind", "policy"), [("qwen3-gqa", "trimkv"), ("llama3-rope", "keydiff"), ("phi3-longrope", "trimkv")]
)
def test_it_is_the_eager_engine(kind: str, policy: str, tmp_path: Path) -> None:
    eager, layerwise, tokens = playback(kind, CacheConfig(20, 8, 8, policy=policy), tmp_path)
    for _ in range(2):  # reset plays it again
        start = events = 0
        for size in PLAN:
            chunk = tokens[start : start + size]
            np.testing.assert_allclose(layerwise.prefill(chunk), eager.prefill(chunk), rtol=1e-5, atol=1e-5)
            start += size
            if eager.room == 0:
                assert layerwise.room == 0
                for _ in range(2):  # before and after
                    one, other = layerwise.state(), eager.state()
                    np.testing.assert_array_equal(one.positions, other.positions)
                    for name in ("key", "value", "log_beta"):
                        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
                    if eager.room == 0:
                        layerwise.evict()
                        eager.evict()
                        events += 1
                np.testing.assert_array_equal(layerwise.survivors(), eager.survivors())
        assert events == 5
        layerwise.reset()
        eager.reset()


def test_another_stream_is_refused(tmp_path: Path) -> None:
    _, layerwise, tokens = playback("qwen3-gqa", CONFIG, tmp_path)
    with pytest.raises(StateError, match="plays back one stream"):
        layerwise.prefill([tokens[0] + 1, *tokens[1:8]])
    with pytest.raises(StateError, match="plays back one stream"):
        layerwise.prefill(tokens[:3])
    layerwise.prefill(tokens[:8])
    with pytest.raises(StateError, match="states at events only"):
        layerwise.state()
