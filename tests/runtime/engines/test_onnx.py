"""What the ONNX engine does when something is wrong."""

from __future__ import annotations

import builtins
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import gated_model, random_tokens
from onnx_artefact import Artefact, check_another, feed, make_artefact, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, StateError, TrimKVError
from trimkv_edge.runtime.engines.onnx import OnnxEngine, _plain_attention


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    config = CacheConfig(budget=12, buffer=4, prefill_chunk=4)
    return make_artefact(tmp_path_factory.mktemp("engine"), spread_gates(gated_model("llama-gqa")), config)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "evict.onnx", "gates.onnx"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "missing"])
def test_damaged_files_are_named_in_one_line(artefact: Artefact, tmp_path: Path, name: str, damage: str) -> None:
    if (name, damage) == ("decoder.onnx.data", "garbled"):
        pytest.skip("any bytes are weights: the manifest's sha256 finds this")
    folder = shutil.copytree(artefact.folder, tmp_path / "broken")
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff" * len(content))
    told = r"does not load in onnxruntime .*export it again"
    if damage == "missing" and name != "decoder.onnx.data":
        told = rf"{name} is missing: export the artefact again"
    with pytest.raises(ArtefactError, match=told) as error:
        OnnxEngine(folder, artefact.manifest, artefact.target)
    assert "\n" not in str(error.value)


def test_files_of_two_artefacts_are_refused(artefact: Artefact) -> None:
    manifest = replace(artefact.manifest, cache=CacheConfig(budget=16, buffer=4, prefill_chunk=4))
    with pytest.raises(ArtefactError, match="files of two artefacts are mixed"):
        OnnxEngine(artefact.folder, manifest, artefact.target)


def test_missing_onnxruntime_says_what_to_install(artefact: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("no module")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(TrimKVError, match=r"pip install 'trimkv-edge\[onnx\]'"):
        artefact.onnx()


def test_threads_are_checked(artefact: Artefact) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        OnnxEngine(artefact.folder, artefact.manifest, artefact.target, threads=0)
    OnnxEngine(artefact.folder, artefact.manifest, artefact.target)


def test_refused_steps_leave_the_stream_as_it_was(artefact: Artefact) -> None:
    engine, untouched = artefact.onnx(), artefact.onnx()
    tokens = random_tokens(30)
    for each in (engine, untouched):
        feed(each, tokens, (4,))
    for bad in ([], [1] * 5, [-1], [10**6]):
        with pytest.raises(StateError):
            engine.prefill(bad)
    with pytest.raises(StateError):
        engine.evict()
    assert (engine.seen, engine.live) == (untouched.seen, untouched.live)
    np.testing.assert_array_equal(engine.decode(7), untouched.decode(7))


def test_step_that_fails_in_the_runtime_can_be_repeated(artefact: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, untouched = artefact.onnx(), artefact.onnx()
    for each in (engine, untouched):
        feed(each, random_tokens(22), (4, 1))

    class Fails:
        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_decoder", Fails())
        with pytest.raises(RuntimeError):
            engine.decode(5)
    assert (engine.seen, engine.live) == (untouched.seen, untouched.live)
    np.testing.assert_array_equal(engine.decode(5), untouched.decode(5))


def test_returned_logits_belong_to_the_caller(artefact: Artefact) -> None:
    engine = artefact.onnx()
    first = engine.decode(5)
    copy = first.copy()
    engine.decode(6)
    np.testing.assert_array_equal(first, copy)


def test_state_arrays_are_copies(artefact: Artefact) -> None:
    engine = artefact.onnx()
    feed(engine, random_tokens(10), (4,))
    state, kept = engine.state(), engine.survivors()
    frozen = [array.copy() for array in (state.key, state.value, state.log_beta, state.positions, kept)]
    feed(engine, random_tokens(40), (4,))
    for array, copy in zip((state.key, state.value, state.log_beta, state.positions, kept), frozen, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_the_attention_switch_is_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    monkeypatch.delenv(name, raising=False)
    with _plain_attention(True):
        assert os.environ[name] == "1"
    assert name not in os.environ
    with _plain_attention(False):
        assert name not in os.environ
    monkeypatch.setenv(name, "0")
    with _plain_attention(True):
        assert os.environ[name] == "0", "what the user set holds"


def test_engines_of_one_model_do_not_share_their_streams(artefact: Artefact) -> None:
    check_another(artefact.onnx)


def test_engines_of_one_model_share_its_sessions(artefact: Artefact) -> None:
    one = artefact.onnx()
    other = one.another()
    assert (other._decoder, other._evictor, other._gates) == (one._decoder, one._evictor, one._gates)
    assert one.shares_model
