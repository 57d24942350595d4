"""Loading an ExecuTorch artefact: what is damaged, mixed or missing is refused in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch_artefact import ExecuTorchArtefact, make_executorch
from factories import gated_model, random_tokens
from onnx_artefact import check_another, feed

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, StateError, TrimKVError
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine

CONFIG = CacheConfig(budget=8, buffer=4, prefill_chunk=1)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> ExecuTorchArtefact:
    return make_executorch(tmp_path_factory.mktemp("executorch") / "a", gated_model("llama-gqa"), CONFIG, "portable")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:100] + bytes(byte ^ 255 for byte in data[100:200]) + data[200:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda _: b"", lambda _: b"hello" * 99], ids=["cut", "flip", "empty", "text"]
)
def test_damaged_program(artefact: ExecuTorchArtefact, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "model.pte").write_bytes(damage((artefact.folder / "model.pte").read_bytes()))
    with pytest.raises(ArtefactError, match=r"model\.pte does not load in ExecuTorch .*export it again") as caught:
        ExecuTorchEngine(tmp_path, artefact.manifest, artefact.target)
    assert "\n" not in str(caught.value)


def test_missing_program(artefact: ExecuTorchArtefact, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="missing"):
        ExecuTorchEngine(tmp_path, artefact.manifest, artefact.target)
    with pytest.raises(ArtefactError, match="names no program file"):
        ExecuTorchEngine(tmp_path, artefact.manifest, replace(artefact.target, files={}))


def test_manifest_of_another_artefact(artefact: ExecuTorchArtefact) -> None:
    other = replace(artefact.manifest, cache=replace(CONFIG, budget=9))
    with pytest.raises(ArtefactError, match="get_trimkv_budget = 8, but the manifest means 9"):
        ExecuTorchEngine(artefact.folder, other, artefact.target)


def test_threads(artefact: ExecuTorchArtefact) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        artefact.engine(threads=0)
    engine = artefact.engine(threads=2)
    assert (engine._binding._threadpool_get_thread_count(), torch.get_num_threads()) == (2, 2)
    artefact.engine(threads=1)
    assert torch.get_num_threads() == 1


def test_a_failed_step_is_not_counted(artefact: ExecuTorchArtefact) -> None:
    engine, plain = artefact.engine(), artefact.engine()
    tokens = random_tokens(30)
    for each in (engine, plain):
        feed(each, tokens[:10], (1,))
    with pytest.raises(StateError, match="ExecuTorch failed in forward"):
        engine._run("forward", engine._decode_inputs[:2])
    for each in (engine, plain):
        feed(each, tokens[10:], (1,))
    np.testing.assert_array_equal(engine.state().key, plain.state().key)


def test_two_engines_share_nothing(artefact: ExecuTorchArtefact) -> None:
    one, two, alone = (artefact.engine() for _ in range(3))
    mine, other = random_tokens(20), random_tokens(20, seed=1)
    for a, b in zip(mine, other, strict=True):
        for engine, token in ((one, a), (two, b)):
            if engine.room == 0:
                engine.evict()
            engine.decode(token)
    feed(alone, mine, (1,))
    np.testing.assert_array_equal(one.state().key, alone.state().key)


def test_logits_are_the_callers_own(artefact: ExecuTorchArtefact) -> None:
    engine = artefact.engine()
    first = engine.decode(5)
    copy = first.copy()
    engine.decode(6)
    np.testing.assert_array_equal(first, copy)


def test_without_executorch(artefact: ExecuTorchArtefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(TrimKVError, match=r"pip install 'trimkv-edge\[executorch\]'"):
        artefact.engine()


def test_importing_the_module_needs_no_torch() -> None:
    code = "import sys; import trimkv_edge.runtime.engines.executorch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_artefact_folder_may_move(artefact: ExecuTorchArtefact, tmp_path: Path) -> None:
    moved = shutil.copytree(artefact.folder, tmp_path / "with space")
    ExecuTorchEngine(moved, artefact.manifest, artefact.target).decode(5)


def test_engines_of_one_model_do_not_share_their_streams(artefact: ExecuTorchArtefact) -> None:
    check_another(artefact.engine)
