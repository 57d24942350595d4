"""``trimkv-import-gates``, and published gates given straight to ``trimkv-export``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import base_model
from published_gates import raw_gates, write_published
from safetensors.torch import load_file

from trimkv_edge.cli.export import main as export
from trimkv_edge.cli.import_gates import main as import_gates
from trimkv_edge.manifest import file_sha256, load_manifest

SIZES = (2, 64, 2, 16)  # layers, hidden, KV heads, width of tests/factories.py's models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, and published gates of both kinds for it."""
    made = tmp_path_factory.mktemp("published")
    base_model("qwen3-gqa").save_pretrained(made / "model")
    for kind in ("rg", "rg10"):
        write_published(made / kind, raw_gates(kind, *SIZES), kind, *SIZES, nest=False)
    uneven = raw_gates("rg10", *SIZES)
    uneven["model.layers.1.self_attn.retention_gate.bias"] += 1
    write_published(made / "uneven", uneven, "rg10", *SIZES, nest=False)
    return made


def test_export_takes_the_published_form_and_the_imported_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_gates([str(folder / "rg10"), "--model", str(folder / "model"), "-o", str(tmp_path / "gates")])
    shown = capsys.readouterr().out
    digest = file_sha256(folder / "rg10" / "trimkv_weights.pth")
    assert "rg10, 2 layers x 2 KV heads, width 16, bfloat16" in shown
    assert f"sha256 {digest}" in shown
    info = json.loads((tmp_path / "gates" / "gates.json").read_text())
    assert (info["memory"], info["base_model"], info["source"]["sha256"]) == (512, "owner/base", digest)
    assert len(info["base_sha256"]) == 64
    artefacts = {}
    for name, gates in (("published", folder / "rg10"), ("imported", tmp_path / "gates")):
        artefacts[name] = tmp_path / name
        arguments = ["--model", str(folder / "model"), "--gates", str(gates), "--budget", "16", "--buffer", "8"]
        export([*arguments, "--target", "onnx", "-o", str(tmp_path / name)])
        shown = capsys.readouterr().out
        assert ("a pickle, read without running code from it" in shown) == (name == "published")
        held = load_manifest(tmp_path / name).gates
        assert (held.kind, held.source, held.intermediate_size) == ("rg10", str(gates), 16)
    assert load_manifest(artefacts["published"]).gates.sha256 == digest
    graphs = [path / "decoder.onnx.data" for path in artefacts.values()]
    assert file_sha256(graphs[0]) == file_sha256(graphs[1])


def test_tied_copies(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_gates([str(folder / "uneven"), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "1 of 2 copies differ from layer 0's (by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    import_gates([str(folder / "uneven"), "-o", str(tmp_path / "out"), "--tied-copy", "last"])
    want = raw_gates("rg10", *SIZES)["model.layers.1.self_attn.retention_gate.bias"] + 1
    held = load_file(tmp_path / "out" / "gates.safetensors")
    assert all(torch.equal(held[f"model.layers.{n}.self_attn.retention_gate.bias"], want) for n in range(2))


def test_force_replaces_gates_but_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_gates([str(folder / "rg"), "-o", str(out)])
    with pytest.raises(SystemExit):
        import_gates([str(folder / "rg10"), "-o", str(out)])
    assert json.loads((out / "gates.json").read_text())["kind"] == "rg"
    import_gates([str(folder / "rg10"), "-o", str(out), "--force"])
    assert json.loads((out / "gates.json").read_text())["kind"] == "rg10"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SystemExit):
        import_gates([str(folder / "rg"), "-o", str(folder / "model"), "--force"])
    assert (folder / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no such file or folder, and not a hub id"),
        (["owner/nowhere"], "neither in the local hub cache nor can they be downloaded now"),
        (["{folder}/model"], "holds no gate file"),
        (["{folder}/rg/trimkv_weights.pth", "--config", "/nowhere.json"], "give --config FILE"),
        (["{folder}/rg", "--model", "tiny"], "wrong gates"),
        (["{folder}/rg", "--model", "nothing"], "known names"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        import_gates([*(part.format(folder=folder) for part in arguments), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_gates_of_another_config_are_refused_by_export(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_published(tmp_path / "other", raw_gates("rg", *SIZES), "rg", *SIZES, nest=False)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(SystemExit):
        export(["--model", str(folder / "model"), "--gates", str(other), "-o", str(tmp_path / "x")])
    assert "act='gelu'" in capsys.readouterr().err
