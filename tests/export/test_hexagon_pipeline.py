"""``npu:hexagon`` as a user exports it: what is written, verified, run and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_artefact import need
from export_request import request_for
from factories import base_config, random_tokens

from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.hexagon import load_info
from trimkv_edge.manifest import load_manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import choose_engine
from trimkv_edge.runtime.session import Session

need("npu:hexagon")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("qwen3-gqa").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "artefact"
    request = request_for(model, output, targets=("npu:hexagon", "onnx"), ops=("fp16",), soc="sm8650")
    run_export(plan_export(request), lambda line: None)
    return output


def test_manifest_tells_what_was_made(artefact: Path) -> None:
    target = load_manifest(artefact).targets["npu:hexagon"]
    assert (target.engine, target.ops, target.speed) == ("qnn-emulator", "fp16", {})
    assert target.parity["events"] >= 5
    assert target.parity["survivors"] == target.parity["events"] * 4 * 16
    assert load_info(artefact / "hexagon.json").soc == "sm8650"
    card = (artefact / "README.md").read_text()
    assert "trimkv-edge[qnn-emulator,onnx]" in card


def test_sessions_decode_prefill_and_go_on_elsewhere(artefact: Path, tmp_path: Path) -> None:
    loaded = Artefact.load(artefact)
    tokens = random_tokens(90, seed=9)
    emulator, plain = (Session.open(loaded, engine=name) for name in ("qnn-emulator", "onnx"))
    for session in (emulator, plain):
        session.feed(tokens)
    kept = [one.engine.survivors().reshape(4, -1).tolist() for one in (emulator, plain)]
    alike = sum(len(set(a) & set(b)) for a, b in zip(*kept, strict=True))
    assert alike >= 0.95 * 4 * 16
    said = [piece.token for piece in emulator.generate(20)]
    assert len(said) == 20
    emulator.save(tmp_path / "one.session")
    plain.load(tmp_path / "one.session")
    assert plain.engine.seen == emulator.engine.seen
    assert [row.tolist() for row in plain.engine.survivors()] == [row.tolist() for row in emulator.engine.survivors()]


def test_engines_are_chosen_by_what_targets_name(artefact: Path) -> None:
    loaded = Artefact.load(artefact)
    assert choose_engine(loaded) == "qnn-emulator"
    assert choose_engine(loaded, "onnx") == "onnx"
    with pytest.raises(ArtefactError, match="has no host-evicted target, only npu:hexagon, onnx"):
        choose_engine(loaded, "host-evicted")


def test_options_of_the_target_need_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shards is parts of a graph of --target npu:hexagon"):
        plan_export(request_for(model, tmp_path / "new", targets=("onnx",), shards=2))
    with pytest.raises(ConfigError, match="--shards is 3, but 2 layers can be cut into 1 to 2 parts"):
        plan_export(request_for(model, tmp_path / "new", targets=("npu:hexagon",), shards=3))
    with pytest.raises(ConfigError, match="--soc is a chip of --target npu:hexagon"):
        plan_export(request_for(model, tmp_path / "new", targets=("onnx",), soc="sm8750"))
    with pytest.raises(ConfigError, match="SoC 'sm1' is not known"):
        plan_export(request_for(model, tmp_path / "new", targets=("npu:hexagon",), soc="sm1"))
