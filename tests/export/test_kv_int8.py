"""An int8 cache end to end: scales from a sample, the exported graphs, states that move between engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import gated_model, random_tokens
from onnx_artefact import feed, make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.kv_ranges import measure_scales
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.pipeline import ExportRequest, plan_export
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights, exact
from trimkv_edge.export.verify import compare, stream_plan
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8, kv_dtype="int8")


def measured(model: GatedModel, tokens: list[int]) -> KVScales:
    return measure_scales(ReferenceWeights(model, model_weights(model), SCHEMES["none"], exact), tokens)


def opened(kind: str, folder: Path) -> tuple[EagerEngine, OnnxEngine]:
    model = gated_model(kind)
    scales = measured(model, random_tokens(100, seed=8))
    target = export_onnx(model, CONFIG, folder, scales=scales)
    manifest = make_manifest(model, CONFIG, target)
    return EagerEngine(model, CONFIG, scales=scales), OnnxEngine(folder, manifest, target, threads=1)


@pytest.mark.parametrize("kind", ["qwen3-gqa", "phi3-partial-rotary"])
def test_scales_cover_a_sample_at_any_position(kind: str) -> None:
    model = gated_model(kind)
    tokens = random_tokens(60, seed=1)
    scales = measured(model, tokens)
    config = CacheConfig(budget=60, buffer=60, prefill_chunk=60)
    for start in (0, 1000):
        engine = EagerEngine(model, config)
        engine.seen = engine.cache.seen = start
        engine.prefill(tokens)
        key, value, _ = engine._read()
        largest = [np.abs(table[:, :, :60]).max(2) for table in (key, value)]
        assert (largest[0] <= scales.key * 127).all()
        assert (largest[1] <= scales.value * 127).all()
        # Within the margin of 1.1 for values; a key's pair may be up to sqrt 2 longer than either channel.
        assert (largest[1] * 1.101 >= scales.value * 127).all()
        rotated = scales.key.max(-1) * 127 / 1.1
        assert (largest[0].max(-1) * 1.4143 >= rotated).all()


@pytest.mark.parametrize("kind", ["qwen3-gqa", "phi3-mha"])
def test_the_graph_rounds_as_the_reference_does(kind: str, tmp_path: Path) -> None:
    eager, engine = opened(kind, tmp_path)
    assert engine._arrays["0.key"].dtype == np.int8
    tokens = random_tokens(100, seed=3)
    plan = stream_plan(24, 8, 8, events=8, singles=5)
    report = compare(eager, engine, tokens, plan, 2e-5, scripted=True)
    # A number between two levels goes up or down with the last bit of float32.
    assert report.events == 8
    assert report.survivor_mismatches <= 0.01 * report.survivors
    assert report.greedy_mismatches <= 1
    assert report.max_logit_diff < 0.02 * max(1.0, report.max_logit)
    plain = EagerEngine(gated_model(kind), replace(CONFIG, kv_dtype="float32"))
    eager.reset()
    assert np.abs(plain.prefill(tokens[:8]) - eager.prefill(tokens[:8])).max() > 1e-3


def test_states_move_between_engines_without_loss(tmp_path: Path) -> None:
    eager, engine = opened("qwen3-gqa", tmp_path)
    tokens = random_tokens(50, seed=4)
    feed(eager, tokens, [8])
    engine.load_state(eager.state())
    first, second = eager.state(), engine.state()
    for name in ("key", "value", "log_beta", "positions"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-6)
    np.testing.assert_allclose(eager.decode(7), engine.decode(7), atol=1e-3)


def test_what_cannot_hold_int8_is_refused(tmp_path: Path) -> None:
    model = gated_model("qwen3-gqa")
    scales = measured(model, random_tokens(20))
    with pytest.raises(ConfigError, match="need scales"):
        export_onnx(model, CONFIG, tmp_path)
    with pytest.raises(ConfigError, match="standard keeps float32 keys and values only"):
        export_onnx(model, CONFIG, tmp_path, ops="standard", scales=scales)
    with pytest.raises(ConfigError, match="keydiff needs float32 keys"):
        export_onnx(model, replace(CONFIG, policy="keydiff"), tmp_path, scales=scales)
    request = ExportRequest("tiny", tmp_path / "out", "64", buffer=32, prefill_chunk=32, kv_dtype="int8")
    with pytest.raises(ConfigError, match="executorch keeps float32 keys and values"):
        plan_export(request)
    with pytest.raises(ConfigError, match="policy global needs float32 keys"):
        plan_export(replace(request, targets=("onnx",), policy="global"))
    assert list(tmp_path.iterdir()) == []
