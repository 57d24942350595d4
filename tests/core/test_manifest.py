"""The artefact's manifest: what is written is read back, and everything else is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError
from trimkv_edge.manifest import (
    ByteInfo,
    FileInfo,
    GateInfo,
    Manifest,
    ModelInfo,
    RopeInfo,
    Target,
    TokenizerInfo,
    check_file,
    describe_files,
    file_sha256,
    load_manifest,
)

PROGRAM = b"a program" * 100


def manifest(**changed: Any) -> Manifest:
    fields: dict[str, Any] = dict(
        schema_version=1,
        model=ModelInfo("toy", "toy-source", "qwen3", "ab" * 32, False, 2, 64, 4, 2, 16, 320, 100_000, 4096),
        gates=GateInfo("rg", "random", "", 24),
        cache=CacheConfig(12, 4, 4, sinks=1),
        rope=RopeInfo("short", 4096),
        tokenizer=TokenizerInfo(300, [2, 7], 1),
        dtype="float32",
        quantization="none",
        bytes=ByteInfo(1, 2, 3),
        targets={"cpu": Target("executorch", "portable", {"program": "model.pte"}, {"logits": 1e-6})},
        files={"model.pte": FileInfo(hashlib.sha256(PROGRAM).hexdigest(), len(PROGRAM))},
        tools={"torch": "2.13"},
    )
    return Manifest(**{**fields, **changed})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.pte").write_bytes(PROGRAM)
    manifest().save(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        load_manifest(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("tokenizer", [None, TokenizerInfo(300, [2]), TokenizerInfo(300, [2, 7], 1)])
def test_round_trip(folder: Path, tokenizer: TokenizerInfo | None) -> None:
    wanted = manifest(tokenizer=tokenizer)
    wanted.save(folder)
    assert load_manifest(folder) == wanted
    assert isinstance(load_manifest(folder).cache, CacheConfig)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.pte"]


def test_a_failed_save_keeps_the_old_manifest(folder: Path) -> None:
    with pytest.raises(TypeError):
        manifest(tools={"torch": object()}).save(folder)
    assert load_manifest(folder) == manifest()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.pte"]


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_unknown_schema_version(folder: Path, version: Any) -> None:
    edit(folder, lambda raw: raw.update(schema_version=version))
    refused(folder, "schema" if version is not True else "schema_version", "export" if version is not True else "")


@pytest.mark.parametrize("where", ["", "model", "gates", "cache", "rope", "tokenizer", "bytes"])
def test_unknown_key(folder: Path, where: str) -> None:
    edit(folder, lambda raw: (raw[where] if where else raw).update(surprise=1))
    refused(folder, "surprise", "export it again")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "num_layers", "2"),
        ("model", "num_layers", 2.5),
        ("model", "random_weights", 1),
        ("gates", "kind", None),
        ("cache", "budget", "12"),
        ("cache", "budget", True),
        ("cache", "policy", 3),
        ("rope", "position_limit", [1]),
        ("tokenizer", "eos_token_ids", 2),
        ("bytes", "cache", None),
    ],
)
def test_wrong_type(folder: Path, section: str, key: str, value: Any) -> None:
    edit(folder, lambda raw: raw[section].update({key: value}))
    refused(folder, "manifest.json", f"{section}", "export it again")


@pytest.mark.parametrize("key", ["model", "cache", "dtype", "files", "targets"])
def test_missing_key(folder: Path, key: str) -> None:
    edit(folder, lambda raw: raw.pop(key))
    refused(folder, key, "export it again")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"budget": 0}, ["budget is 0", "integer >= 1"]),
        ({"prefill_chunk": 5}, ["prefill chunk 5", "--buffer"]),
        ({"budget": 3}, ["3 entries", "--prefill-chunk"]),
        ({"sinks": 13}, ["sinks (13)", "budget of 12"]),
    ],
)
def test_impossible_cache(folder: Path, change: dict[str, int], parts: list[str]) -> None:
    edit(folder, lambda raw: raw["cache"].update(change))
    refused(folder, "manifest.json", *parts)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema_version": 1}', "\xff", "{}\n{}"])
def test_not_a_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(folder, "manifest.json", "export")


def test_missing_folder_and_missing_manifest(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "trimkv-export")
    refused(tmp_path, "manifest.json", "trimkv-export")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "trimkv-export")


def test_changed_files(folder: Path) -> None:
    program = folder / "model.pte"
    program.write_bytes(PROGRAM[:-1] + b"!")
    refused(folder, "model.pte", "sha256", "copy or export it again")
    program.write_bytes(PROGRAM + b"!")
    refused(folder, "model.pte", "901 bytes", "900", "copy or export it again")
    load_manifest(folder, verify_files=False)
    program.unlink()
    refused(folder, "model.pte", "missing", "export")
    program.mkdir()
    refused(folder, "model.pte", "missing")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda raw: raw["files"].update({name: raw["files"]["model.pte"]}))
    refused(folder, name, "outside", "export it again")


def test_describe_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "empty").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    found = describe_files(folder)
    assert found == {"model.pte": manifest().files["model.pte"], "sub/empty": FileInfo(empty, 0)}
    assert file_sha256(folder / "sub" / "empty") == empty
    for name, info in found.items():
        check_file(folder / name, info)
