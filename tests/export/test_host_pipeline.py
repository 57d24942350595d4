"""The ``host-evicted`` target as a user exports it: what is written, verified, run and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_request import request_for
from factories import base_config, random_tokens

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.loading import load_model
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.session import Session

FILES = {"host_decode.onnx", "host_prefill.onnx", "host_weights.bin", "host_embedding.bin", "host.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("phi3-longrope").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "artefact"
    run_export(plan_export(request_for(model, output, targets=("host-evicted", "onnx"))), lambda line: None)
    return output


def test_manifest_tells_what_was_made(artefact: Path) -> None:
    manifest = load_manifest(artefact)
    target = manifest.targets["host-evicted"]
    assert (target.engine, target.ops) == ("host-evicted", "rows")
    assert set(target.files.values()) == FILES
    onnx_files = {"decoder.onnx", "decoder.onnx.data", "gates.onnx", "gates.onnx.data", "evict.onnx"}
    assert set(manifest.files) == {*FILES, *onnx_files, "README.md"}
    assert target.parity["events"] >= 5
    assert target.parity["survivors"] == target.parity["events"] * 4 * 16
    for name in ("survivor_mismatches", "greedy_mismatches", "undecidable"):
        assert target.parity[name] == 0
    assert target.speed["steps"] > 0


def test_sessions_run_and_say_what_eager_says(artefact: Path, model: Path) -> None:
    loaded = Artefact.load(artefact)
    source = plan_export(request_for(model, artefact.with_name("other"))).source
    eager = EagerEngine(load_model(source).model, loaded.manifest.cache)
    tokens = random_tokens(90, seed=9)
    said = []
    for name in ("host-evicted", "onnx"):
        session = Session.open(loaded, engine=name)
        session.feed(tokens)
        said.append([piece.token for piece in session.generate(20)])
    want = []
    for token in tokens:
        logits = step(eager, token)
    for _ in range(20):
        want.append(int(logits.argmax()))
        logits = step(eager, want[-1])
    assert said == [want, want]


def step(engine: EagerEngine, token: int) -> np.ndarray:
    if engine.room == 0:
        engine.evict()
    return engine.decode(token)


def test_the_first_target_is_the_default_engine(artefact: Path) -> None:
    assert load_engine(Artefact.load(artefact)).name == "host-evicted"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(policy="global"), "a budget that heads share, which a host-evicted graph does not have yet"),
        (dict(quant="int8"), "host-evicted cannot run int8 weights: use one of none"),
        (dict(kv_dtype="int8"), "host-evicted keeps float32 keys and values"),
        (dict(ops=("gqa",)), "operator set gqa fits no chosen target"),
    ],
    ids=["shared-budget", "int8-weights", "int8-cache", "operators"],
)
def test_what_the_target_cannot_have_is_refused_before_anything_is_built(
    settings: dict[str, Any], told: str, model: Path, tmp_path: Path
) -> None:
    request = request_for(model, tmp_path / "new", targets=("host-evicted",), **settings)
    with pytest.raises(ConfigError, match=told):
        plan_export(request)
    assert not list(tmp_path.iterdir())
