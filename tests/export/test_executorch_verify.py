"""Verification with the same rounding of activations: calls that are far are counted and undone, faults still show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import VerificationError
from trimkv_edge.export import check_artefact
from trimkv_edge.export.check_artefact import _Check
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.export.verify import ParityReport, check, compare, load_tolerance, stream_plan
from trimkv_edge.manifest import RopeInfo
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.skeleton import model_weights

CONFIG = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
PLAN = stream_plan(16, 8, 8)
TOLERANCE = load_tolerance("rounded")


class Flips(EagerEngine):
    """Every eighth call stores values that are off, as one rounding that went the other way does."""

    every = 8
    calls = 0

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        self.calls += 1
        if self.calls % self.every == 0:
            for table in self.cache.value:
                table[:, :, :live] *= 1.01
        return super()._forward(ids, position, live)


class Forgets(EagerEngine):
    """Each call's own logits are right, but what it stored is gone afterwards."""

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        logits = super()._forward(ids, position, live)
        for table in self.cache.value:
            table[:, :, live : live + ids.size] = 0
        return logits


def report_on(kind: type[EagerEngine], close_abs: float | None) -> ParityReport:
    model = gated_model("qwen3-gqa")
    engines = EagerEngine(model, CONFIG), kind(model, CONFIG)
    return compare(*engines, random_tokens(sum(PLAN)), PLAN, TOLERANCE.score_rel, close_abs=close_abs)


def test_calls_that_are_far_are_counted_and_undone() -> None:
    report = report_on(Flips, TOLERANCE.close_abs)
    # Nor do calls count that come with the reference's state.
    flips = [call for call in range(1, len(PLAN) + 1) if call % Flips.every == 0]
    after = [call for call in flips if call < len(PLAN)]
    assert report.close == len(PLAN) - len(flips) - len(after)
    assert report.max_logit_diff > 1e-3
    check(report, TOLERANCE, "the artefact")
    plain = report_on(Flips, None)
    assert plain.close is None
    assert "close" not in plain.as_dict()
    assert plain.max_logit_diff > 2 * report.max_logit_diff, "what went wrong once was undone all the same"


def test_equal_engines_are_close_throughout() -> None:
    report = report_on(EagerEngine, TOLERANCE.close_abs)
    assert report.as_dict()["close"] == len(PLAN)


def test_a_cache_that_does_not_last_is_found() -> None:
    report = report_on(Forgets, TOLERANCE.close_abs)
    with pytest.raises(VerificationError, match=rf"logits of only \d+ of {len(PLAN)} calls are close"):
        check(report, replace(TOLERANCE, logits_abs=9.0, greedy_share=1.0, survivors_share=1.0), "the artefact")


def job(parameters: int = 10) -> _Check:
    model = gated_model("phi3-mha")
    loaded = SimpleNamespace(
        model=model,
        weights=model_weights(model),
        info=SimpleNamespace(parameters=parameters, random_weights=False),
    )
    manifest = SimpleNamespace(cache=CONFIG, rope=RopeInfo())
    return _Check(manifest, loaded, Path(), print, None, None)  # type: ignore[arg-type]


def test_small_models_have_a_reference_of_the_same_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, spec = SCHEMES["8da4w"], TARGETS["executorch"]
    assert job().rounded_reference(spec, scheme) is not None
    assert job(parameters=2**29 + 1).rounded_reference(spec, scheme) is None
    assert job().rounded_reference(TARGETS["onnx"], scheme) is None
    # 2 layers of 64 (qkv), 64 (o), 64 (gate and up) and 96 (down), and 64 for the output layer.
    for most, want in ((639, False), (640, True)):
        monkeypatch.setattr(check_artefact, "_ROUNDINGS", most)
        assert (job().rounded_reference(spec, scheme) is not None) == want
