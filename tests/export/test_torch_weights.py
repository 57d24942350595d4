"""The ``torch`` target: what is stored, what transformers and the torch engine make of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import base_model, gated_model, random_tokens
from onnx_artefact import feed, spread_gates
from safetensors import safe_open
from safetensors.torch import load_file
from torch_artefact import save_torch_artefact
from transformers import AutoModelForCausalLM

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.export.check_artefact import verify_targets
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.export.verify import check, compare, load_tolerance, stream_plan
from trimkv_edge.gpu.artefact import TorchArtefactEngine, TorchPooledArtefactEngine
from trimkv_edge.manifest import Manifest, RopeInfo
from trimkv_edge.models.eager import EagerEngine, eager_engine
from trimkv_edge.models.loading import LoadedModel
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.retention import NoGate
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import choose_engine, engine_class
from trimkv_edge.runtime.session import Session

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
TOKENS = random_tokens(120, seed=6)


def opened(
    folder: Path, manifest: Manifest, kind: type[Any] = TorchArtefactEngine
) -> TorchArtefactEngine | TorchPooledArtefactEngine:
    return kind(folder, manifest, manifest.targets["torch"], device="cpu", compiled=False)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch-artefact")
    save_torch_artefact(folder, spread_gates(gated_model("llama-gqa")), shard=40_000)
    return folder


def test_transformers_loads_the_weights_as_any_model(artefact: Path) -> None:
    folder = artefact / "torch"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    named = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(named["weight_map"].values()) == {path.name for path in shards}
    held = [name for path in shards for name in load_file(path)]
    assert sorted(held) == sorted(named["weight_map"])
    assert named["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in load_file(path).values())
    tokens = torch.tensor([random_tokens(20)])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(loaded(tokens).logits, base_model("llama-gqa")(tokens).logits)
    assert loaded.config.use_cache


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("case", ["qwen3-gqa", "phi3-partial-rotary"])
def test_the_engine_follows_the_eager_model(tmp_path: Path, case: str, kind: str) -> None:
    model = spread_gates(gated_model(case, kind))
    engine, eager = opened(tmp_path, save_torch_artefact(tmp_path, model)), EagerEngine(model, CONFIG)
    for got, want in zip(feed(engine, TOKENS, [8, 3, 1]), feed(eager, TOKENS, [8, 3, 1]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(engine.survivors(), eager.survivors())
    assert engine.threads == torch.get_num_threads()


def test_heads_that_share_a_budget_follow_the_eager_model(tmp_path: Path) -> None:
    config = CacheConfig(24, 8, 8, policy="global", caps=((30, 40), (24, 26)))
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    manifest = save_torch_artefact(tmp_path, model, config=config)
    assert engine_class("torch", config) is TorchPooledArtefactEngine
    engine, eager = opened(tmp_path, manifest, TorchPooledArtefactEngine), eager_engine(model, config)
    for got, want in zip(feed(engine, TOKENS, [8, 3, 1]), feed(eager, TOKENS, [8, 3, 1]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(engine.survivors(), eager.survivors())
    other = engine.another()
    other.decode(5)
    assert (other.seen, engine.seen) == (1, len(TOKENS))


@pytest.mark.parametrize("rope", ["short", "long"])
def test_rotary_factors_are_those_of_the_manifest(tmp_path: Path, rope: str) -> None:
    model = gated_model("phi3-longrope", rope=rope)
    manifest = replace(save_torch_artefact(tmp_path, model), rope=RopeInfo(rope))
    got, want = (engine.prefill(TOKENS[:8]) for engine in (opened(tmp_path, manifest), EagerEngine(model, CONFIG)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_model_without_gates_has_no_gate_file(tmp_path: Path) -> None:
    config = CacheConfig(24, 8, 8, policy="streaming", sinks=2)
    model = gated_model("llama-gqa")
    for layer in model.base.model.layers:
        layer.self_attn.retention_gate = NoGate(2)
    manifest = save_torch_artefact(tmp_path, model, config=config)
    manifest = replace(manifest, gates=replace(manifest.gates, kind="none"))
    assert {path.name for path in (tmp_path / "torch").iterdir()} == {"config.json", "model.safetensors"}
    engine, eager = opened(tmp_path, manifest), EagerEngine(model, config)
    feed(engine, TOKENS, [8])
    feed(eager, TOKENS, [8])
    np.testing.assert_array_equal(engine.survivors(), eager.survivors())


def test_float16_is_stored_and_computed_with(tmp_path: Path) -> None:
    config = replace(CONFIG, kv_dtype="float16")
    model = spread_gates(gated_model("qwen3-gqa"))
    manifest = save_torch_artefact(tmp_path, model, "fp16", config)
    with safe_open(tmp_path / "torch" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    with safe_open(tmp_path / "torch" / "gates.safetensors", "pt") as file:
        kinds = {name.rpartition("retention_gate.")[2]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"bias": "F32", "linear1.weight": "F16", "linear1.bias": "F16", "linear2.weight": "F16"}
    engine = opened(tmp_path, manifest)
    assert engine.cache.key.dtype is torch.float16
    for name, parameter in model.named_parameters():
        if not name.endswith("retention_gate.bias"):
            parameter.data = parameter.data.half().float()
    eager = EagerEngine(model, config)
    tolerance = load_tolerance("float16")
    report = compare(eager, engine, random_tokens(400), stream_plan(24, 8, 8), tolerance.score_rel)
    check(report, replace(tolerance, greedy_share=1.0), "the torch artefact")
    assert report.max_logit_diff > 1e-5


def test_exports_verify_it_and_sessions_run_it_compiled(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    shutil.copytree(artefact, folder)
    model, found = spread_gates(gated_model("llama-gqa")), Artefact.load(folder)
    info = replace(found.manifest.model, random_weights=False)
    loaded = LoadedModel(model, info, found.manifest.gates, found.manifest.rope, model_weights(model))
    verified = verify_targets(found.manifest, loaded, folder, lambda line: None).targets["torch"]
    assert verified.parity["events"] >= 5
    assert verified.parity["survivor_mismatches"] == verified.parity["greedy_mismatches"] == 0
    assert verified.speed["steps"] > 0
    assert choose_engine(found) == "torch"  # the only target
    session = Session.open(found, "torch", profile=True)
    session.feed(TOKENS)
    said = [piece.token for piece in session.generate(40)]
    eager = Session(EagerEngine(model, CONFIG))
    eager.feed(TOKENS)
    assert said == [piece.token for piece in eager.generate(40)]
    rows = session.engine.profile_rows()
    assert any("attend" in row.operator and row.calls >= 40 for row in rows)
    assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)
    before = session.engine.survivors()
    other = session.engine.another()
    other.decode(5)
    assert other.seen == 1
    assert other.graphs.model is session.engine.graphs.model
    np.testing.assert_array_equal(session.engine.survivors(), before)


def test_damage_is_told(artefact: Path, tmp_path: Path) -> None:
    manifest = Artefact.load(artefact).manifest
    for number, (file, text) in enumerate(
        [("config.json", "{"), ("model.safetensors.index.json", "[]"), ("gates.safetensors", "no"), (None, "")]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(artefact, folder)
        if file is None:
            sorted((folder / "torch").glob("model-*.safetensors"))[0].unlink()
        else:
            (folder / "torch" / file).write_text(text, encoding="utf-8")
        with pytest.raises(ArtefactError, match="cannot be read"):
            opened(folder, manifest)
    (folder / "torch" / "config.json").unlink()
    with pytest.raises(ArtefactError, match="is missing: export the artefact again"):
        opened(folder, manifest)


def test_weights_of_another_shape_are_refused(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    shutil.copytree(artefact, folder)
    config = json.loads((folder / "torch" / "config.json").read_text(encoding="utf-8"))
    (folder / "torch" / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}), encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"do not fit its config\.json"):
        opened(folder, Artefact.load(artefact).manifest)


def test_settings_that_the_engine_cannot_honour_are_refused_before_an_export() -> None:
    for config in (CacheConfig(16, 8, 8, policy="h2o"), CacheConfig(16, 8, 8, kv_dtype="int8")):
        with pytest.raises(ConfigError, match="torch engine"):
            TARGETS["torch"].check(config)
