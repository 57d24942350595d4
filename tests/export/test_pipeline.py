"""The whole export on a small model: what is written, what the manifest says, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_request import request_for
from factories import base_config, gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError, ModelError, VerificationError
from trimkv_edge.export import check_artefact, pipeline, targets
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.loading import load_model
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("qwen3-gqa").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "artefact"
    lines: list[str] = []
    run_export(plan_export(request_for(model, output)), lines.append)
    assert len([line for line in lines if not line.startswith(" ")]) == 5
    return output


def test_manifest_tells_what_was_made(artefact: Path) -> None:
    manifest = load_manifest(artefact)
    graphs = {"decoder.onnx", "decoder.onnx.data", "gates.onnx", "gates.onnx.data", "evict.onnx"}
    assert set(manifest.files) == {"README.md", "model.pte", *graphs}
    assert manifest.model.random_weights
    assert manifest.tokenizer is None
    # 24 slots x 4 rows x (2 x 32 x 4 + 4) bytes, and 16 positions x 4 rows x 8 bytes.
    assert manifest.bytes.cache == 24 * 4 * 260 + 16 * 4 * 8
    assert manifest.bytes.weights == 4 * manifest.model.parameters
    for target in manifest.targets.values():
        parity = target.parity
        assert parity["events"] >= 5
        assert parity["survivors"] == parity["events"] * 4 * 16
        assert parity["survivor_mismatches"] == parity["greedy_mismatches"] == parity["undecidable"] == 0
    assert [path.name for path in artefact.parent.iterdir()] == ["artefact"]


@pytest.mark.parametrize("name", ["executorch", "onnx"])
def test_the_artefact_decodes_like_eager(artefact: Path, model: Path, name: str) -> None:
    loaded = Artefact.load(artefact)
    engine = load_engine(loaded, name)
    source = plan_export(request_for(model, artefact.with_name("other"))).source
    eager = EagerEngine(load_model(source).model, loaded.manifest.cache)
    tokens = random_tokens(120, seed=9)
    while eager.seen < len(tokens):
        size = min(8, eager.room, len(tokens) - eager.seen)
        chunk = tokens[eager.seen : eager.seen + size]
        want, got = eager.prefill(chunk), engine.prefill(chunk)
        assert np.abs(want - got).max() < 1e-4
        if eager.room == 0:
            eager.evict()
            engine.evict()
            np.testing.assert_array_equal(eager.survivors(), engine.survivors())


def test_an_existing_output_is_kept_unless_forced(artefact: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists: choose another -o or give --force"):
        plan_export(request_for(model, artefact))
    before = (artefact / "manifest.json").read_text()
    plan_export(request_for(model, artefact, force=True))
    assert (artefact / "manifest.json").read_text() == before


class ForgetsTheOldest(EagerEngine):
    def _evict(self, seen: int) -> None:
        self.cache.log_beta.fill_(-1.0)
        super()._evict(seen)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose engine evicts wrongly."""

    def export(job: targets.Job) -> Any:
        (job.folder / "model.pte").write_bytes(b"x")
        return targets.Target("executorch", "xnnpack", {"program": "model.pte"})

    def engine_class(name: str, config: CacheConfig, *, vision: bool) -> Any:
        assert not vision
        return lambda folder, manifest, target: ForgetsTheOldest(gated_model("qwen3-gqa"), manifest.cache)

    monkeypatch.setitem(targets.TARGETS, "executorch", targets.TargetSpec(("xnnpack",), export))
    monkeypatch.setattr(check_artefact, "engine_class", engine_class)


@pytest.mark.usefixtures("faulty")
def test_a_failed_verification_writes_nothing(model: Path, tmp_path: Path) -> None:
    plan = plan_export(request_for(model, tmp_path / "new", targets=("executorch",)))
    with pytest.raises(VerificationError, match=r"survivors differ.*nothing was written"):
        run_export(plan, lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("faulty")
def test_a_failed_export_keeps_what_was_there(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "old"
    output.mkdir()
    (output / "precious").write_text("x")
    plan = plan_export(request_for(model, output, targets=("executorch",), force=True))
    with pytest.raises(VerificationError):
        run_export(plan, lambda line: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "precious"]


def test_interrupted_export_writes_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(targets.TARGETS, "onnx", targets.TargetSpec(("gqa",), interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_export(plan_export(request_for(model, tmp_path / "new", targets=("onnx",))), lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    base_config("qwen3-gqa").save_pretrained(tmp_path / "m")
    vocabulary = {f"t{i}": i for i in range(500)}
    (tmp_path / "m" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}})
    )
    with pytest.raises(ModelError, match=r"tokenizer mismatch.* 500 tokens, but the model only 320"):
        run_export(plan_export(request_for(tmp_path / "m", tmp_path / "out")), lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(budget="4"), BudgetError, "smaller than one prefill chunk"),
        (dict(prefill_chunk=9), ConfigError, "prefill chunk 9 is larger than the buffer 8"),
        (dict(budget="1KB"), BudgetError, "does not hold the ring"),
        (dict(dtype="float16"), ConfigError, "'float16' cannot be exported yet"),
        (dict(targets=("tflite",)), ConfigError, "target 'tflite' is not known; use executorch, onnx"),
        (dict(ops=("fastest",)), ConfigError, "operator set fastest fits no chosen target"),
        (dict(ops=("gqa", "standard")), ConfigError, "takes one operator set"),
        (dict(sinks=10, recent=10), BudgetError, "protect more entries"),
        (dict(policy="oldest"), ConfigError, "policy 'oldest' is not known"),
    ],
)
def test_settings_that_cannot_be_honoured(model: Path, tmp_path: Path, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        plan_export(request_for(model, tmp_path / "out", **change))


def test_a_budget_beyond_the_memory_is_refused_before_loading(model: Path, tmp_path: Path) -> None:
    plan = plan_export(request_for(model, tmp_path / "out", budget="2000GB"))
    with pytest.raises(BudgetError, match=r"needs .* GiB, but .* of memory are available"):
        run_export(plan, pytest.fail)


def test_tool_versions_name_what_is_installed() -> None:
    assert {"trimkv-edge", "torch", "onnxruntime", "executorch"} <= set(pipeline.tool_versions())
