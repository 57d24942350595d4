"""What an artefact folder is checked for, and which engine opens it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from text_artefact import TEMPLATE, save_manifest, text_artefact
from text_tokenizers import byte_level

from trimkv_edge.errors import ArtefactError, BudgetError, ConfigError, TrimKVError
from trimkv_edge.manifest import ByteInfo, Target, load_manifest
from trimkv_edge.runtime import engines
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import choose_engine, load_engine
from trimkv_edge.runtime.engines.onnx import OnnxEngine
from trimkv_edge.runtime.session import Session


@pytest.fixture
def original() -> Path:
    return text_artefact()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "artefact"))


def test_a_session_opens_on_an_artefact_and_generates(original: Path) -> None:
    artefact = Artefact.load(original)
    assert artefact.chat_template == TEMPLATE
    assert artefact.tokenizer is not None
    ids = artefact.tokenizer.encode("the cat sat on the mat " * 9)
    session = Session.open(artefact, threads=1)
    session.feed(ids)
    pieces = list(session.generate(20))
    assert isinstance(session.engine, OnnxEngine)
    assert session.statistics().events > 1
    assert session.statistics().cache_bytes == artefact.manifest.bytes.cache
    assert "".join(piece.text for piece in pieces) == artefact.tokenizer.decode([piece.token for piece in pieces])


def test_the_tokenizer_wrapper_round_trips(original: Path) -> None:
    tokenizer = Artefact.load(original).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("über 你好 🙂 cat")) == "über 你好 🙂 cat"
    assert tokenizer.decode([1, 2, 10_000]) == ""
    assert (tokenizer.token(2), tokenizer.token(10_000)) == ("</s>", "")
    with pytest.raises(ConfigError, match="at character 1"):
        tokenizer.encode("a\udcff")


def test_a_changed_file_is_found_unless_not_verified(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(TEMPLATE.replace("[", "("), encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"chat_template.jinja has sha256 .* was changed"):
        Artefact.load(folder)
    assert Artefact.load(folder, verify=False).chat_template == path.read_text(encoding="utf-8")


def test_a_tokenizer_of_another_size_is_refused(folder: Path) -> None:
    byte_level(300).save(str(folder / "tokenizer.json"))
    save_manifest(folder, load_manifest(folder, verify_files=False))
    with pytest.raises(ArtefactError, match=r"tokenizer mismatch: .* has 300 tokens, but the manifest says 311"):
        Artefact.load(folder)


def test_a_tokenizer_that_the_manifest_does_not_know_is_refused(folder: Path) -> None:
    save_manifest(folder, load_manifest(folder), tokenizer=None)
    with pytest.raises(ArtefactError, match="tokenizer mismatch"):
        Artefact.load(folder)


@pytest.mark.parametrize("damage", ["missing", "garbled"])
def test_a_lost_or_garbled_tokenizer_is_named(folder: Path, damage: str) -> None:
    path = folder / "tokenizer.json"
    path.unlink()
    if damage == "garbled":
        path.write_bytes(b"\xff{")
    save_manifest(folder, load_manifest(folder, verify_files=False))
    with pytest.raises(ArtefactError, match=r"tokenizer.json (is missing|cannot be read)"):
        Artefact.load(folder)


def test_an_artefact_without_tokenizer_and_template_loads(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    save_manifest(folder, load_manifest(folder, verify_files=False), tokenizer=None)
    artefact = Artefact.load(folder)
    assert (artefact.tokenizer, artefact.chat_template) == (None, None)
    session = Session.open(artefact)
    session.feed(np.arange(5))
    assert [piece.text for piece in session.generate(3)] == ["", "", ""]


@pytest.mark.parametrize("name", ["../outside.onnx", "unlisted.onnx"])
def test_files_that_the_manifest_does_not_list_are_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    manifest = load_manifest(folder)
    target = replace(manifest.targets["onnx"], files={"decoder": name, "evict": "evict.onnx"})
    replace(manifest, targets={"onnx": target}).save(folder)
    with pytest.raises(ArtefactError, match="not among the artefact's files"):
        Artefact.load(folder)


def test_a_file_missing_after_an_unverified_load_is_named(folder: Path) -> None:
    (folder / "evict.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"evict.onnx is missing"):
        Artefact.load(folder, verify=False)


def test_a_truncated_graph_is_one_line(folder: Path) -> None:
    path = folder / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtefactError, match=r"decoder.onnx does not load") as error:
        load_engine(Artefact.load(folder, verify=False), "onnx")
    assert "\n" not in str(error.value)


def test_an_artefact_that_does_not_fit_is_refused_before_loading(folder: Path) -> None:
    manifest = save_manifest(folder, load_manifest(folder), bytes=ByteInfo(1, 1, 2**50))
    (folder / "decoder.onnx").write_bytes(b"never read")
    with pytest.raises(BudgetError, match=r"needs 1048576.00 GiB, but"):
        load_engine(Artefact(folder, manifest, None, None))


def test_unknown_and_untargeted_engines_are_named_with_the_choices(original: Path) -> None:
    artefact = Artefact.load(original)
    with pytest.raises(ConfigError, match="engine 'tensorrt' is not known; use one of onnx, executorch"):
        choose_engine(artefact, "tensorrt")
    with pytest.raises(ArtefactError, match=r"no executorch target, only onnx: .*--target executorch"):
        choose_engine(artefact, "executorch")
    with pytest.raises(ConfigError, match="threads is 0"):
        load_engine(artefact, threads=0)
    strange = replace(artefact, manifest=replace(artefact.manifest, targets={"tpu": Target("tpu", "", {})}))
    with pytest.raises(ArtefactError, match="has targets tpu, but this trimkv-edge runs onnx, executorch"):
        choose_engine(strange)


def test_the_first_installed_target_is_chosen_and_a_missing_package_named(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = Artefact.load(original)
    onnx = artefact.manifest.targets["onnx"]
    both = replace(artefact, manifest=replace(artefact.manifest, targets={"executorch": onnx, "onnx": onnx}))
    installed = {"onnxruntime", "executorch", "torch"}
    monkeypatch.setattr(engines, "find_spec", lambda name: SimpleNamespace() if name in installed else None)
    assert choose_engine(both) == "executorch"
    installed.remove("executorch")
    assert choose_engine(both) == "onnx"
    with pytest.raises(TrimKVError, match=r"executorch needs executorch\): pip install 'trimkv-edge\[executorch\]'"):
        choose_engine(both, "executorch")
    installed.clear()
    with pytest.raises(TrimKVError, match=r"executorch needs .*; onnx needs onnxruntime"):
        choose_engine(both)


def test_every_registered_engine_can_be_imported_by_its_path() -> None:
    for entry in engines.ENGINES.values():
        module, _, attribute = entry.path.partition(":")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)


def test_running_an_artefact_imports_neither_torch_nor_transformers(original: Path) -> None:
    code = (
        "import sys; from trimkv_edge.cli.run import main\n"
        f"main([{str(original)!r}, '--prompt', 'the cat', '--max-new-tokens', '2', '--chat'])\n"
        "print(*sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""
