"""The layer-by-layer reference of a stream with pictures plays back exactly what the eager engine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import gated_vision_model, random_tokens
from vision_artefact import vision_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.export.layerwise_vision import LayerwiseVisionReference
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights, exact
from trimkv_edge.export.verify import stream_plan
from trimkv_edge.manifest import Target
from trimkv_edge.models.mixed_sample import MixedSample, mixed_sample
from trimkv_edge.models.skeleton import hollow, model_weights
from trimkv_edge.models.vision_engine import VisionEngine, vision_engine

CONFIG = CacheConfig(budget=20, buffer=8, prefill_chunk=8)
PLAN = stream_plan(20, 8, 8, singles=5)


def playback(folder: Path) -> tuple[VisionEngine, LayerwiseVisionReference, MixedSample]:
    real, empty = gated_vision_model(), gated_vision_model()
    weights = model_weights(real)
    hollow(empty)
    vision = vision_manifest(real, CONFIG, Target("onnx", "gqa", {})).vision
    assert vision is not None
    sample = mixed_sample(random_tokens(sum(PLAN), seed=2), vision)
    source = ReferenceWeights(empty, weights, SCHEMES["none"], exact)
    return vision_engine(real, CONFIG), LayerwiseVisionReference(source, CONFIG, sample, PLAN, folder), sample


def test_it_is_the_eager_engine(tmp_path: Path) -> None:
    eager, layerwise, sample = playback(tmp_path)
    assert len(sample.pictures) > 3
    for _ in range(2):  # reset plays it again
        for engine in (eager, layerwise):
            sample.show(engine)
        for one, other in zip(eager.waiting, layerwise.waiting, strict=True):
            np.testing.assert_allclose(other.embeddings, one.embeddings, atol=1e-5)
            np.testing.assert_allclose(other.deepstack, one.deepstack, atol=1e-5)
        start = events = 0
        for size in PLAN:
            chunk = sample.tokens[start : start + size]
            np.testing.assert_allclose(layerwise.prefill(chunk), eager.prefill(chunk), rtol=1e-4, atol=1e-5)
            start += size
            assert layerwise.cursor == eager.cursor
            if eager.room == 0:
                one, other = layerwise.state(), eager.state()
                assert one.cursor == other.cursor
                np.testing.assert_allclose(one.key, other.key, rtol=1e-4, atol=1e-5)
                layerwise.evict()
                eager.evict()
                events += 1
                np.testing.assert_array_equal(layerwise.survivors(), eager.survivors())
        assert events == 5
        assert not layerwise.waiting
        layerwise.reset()
        eager.reset()


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    _, layerwise, sample = playback(tmp_path)
    kind, pixels, grid = sample.pictures[0]
    with pytest.raises(StateError, match="it encodes its pictures only"):
        layerwise.encode(kind, pixels.copy(), grid)
