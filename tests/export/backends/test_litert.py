"""``litert``: what litert-torch makes, run by LiteRT's interpreter with the numpy host around it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from backend_artefact import compiled, need
from factories import gated_model, random_tokens
from host_artefact import compare
from onnx_artefact import Artefact, spread_gates
from oracle_model import OracleModel
from tiny_host import CONFIG as TINY
from tiny_host import decoded

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.demo import demo_text
from trimkv_edge.models.tiny.tokenizer import load_tokenizer
from trimkv_edge.runtime.engines.litert import LiteRTEngine

need("litert")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return compiled("litert", spread_gates(gated_model("llama-gqa")), CONFIG, tmp_path_factory.mktemp("litert"), "fp32")


def engine(artefact: Artefact, folder: Path | None = None) -> LiteRTEngine:
    return LiteRTEngine(folder or artefact.folder, artefact.manifest, artefact.target, threads=1)


@pytest.mark.parametrize("family", ["llama-gqa", "phi3-longrope", "qwen3-gqa"])
def test_same_survivors_tokens_and_logits(family: str, tmp_path: Path) -> None:
    made = compiled("litert", spread_gates(gated_model(family)), CONFIG, tmp_path, "fp32")
    eager, litert, oracle = made.eager(), engine(made), OracleModel(made.model, CONFIG)
    tokens = random_tokens(24 + 8 * 6 + 3)
    assert compare(litert, eager, oracle, tokens) >= 5


def test_a_long_stream_of_tiny_with_its_trained_gates(tmp_path: Path) -> None:
    model = load_model(find_source("tiny")).model
    made = compiled("litert", model, TINY, tmp_path, "fp32")
    demo = demo_text(450)
    tokens = load_tokenizer().encode(demo.text + demo.questions[0]).ids
    want = decoded(EagerEngine(model, TINY), tokens, 150)
    assert len(tokens) > 450
    assert len(want.events) >= 12
    assert decoded(engine(made), tokens, 150) == want


def test_a_chunk_of_one_has_one_signature(tmp_path: Path) -> None:
    made = compiled("litert", gated_model("llama-gqa"), CacheConfig(12, 4, 1), tmp_path, "fp32")
    litert = engine(made)
    assert list(litert._interpreter.get_signature_list()) == ["decode"]
    eager = made.eager()
    for token in random_tokens(15):
        np.testing.assert_allclose(litert.decode(token), eager.decode(token), atol=1e-4)


def test_both_signatures_share_their_weights(small: Artefact) -> None:
    weights = 4 * sum(parameter.numel() for parameter in small.model.parameters())
    assert (small.folder / "litert.tflite").stat().st_size < 1.5 * weights


def test_another_engine_has_a_stream_of_its_own(small: Artefact) -> None:
    first = engine(small)
    first.prefill([5, 6, 7])
    second = first.another()
    assert (second.seen, first.seen) == (0, 3)
    want = second.prefill([5, 6, 7]).copy()
    first.prefill([9, 9])
    np.testing.assert_array_equal(second.decode(3), engine_after(small, [5, 6, 7]).decode(3))
    assert want.shape == (small.manifest.model.vocab_size,)


def engine_after(artefact: Artefact, tokens: list[int]) -> LiteRTEngine:
    made = engine(artefact)
    made.prefill(tokens)
    return made


@pytest.mark.parametrize("damage", ["garbled", "empty", "missing"])
def test_a_damaged_program_is_named(small: Artefact, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "broken")
    path = folder / "litert.tflite"
    size = path.stat().st_size
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"\xff" * size if damage == "garbled" else b"")
    with pytest.raises(ArtefactError, match=r"litert\.tflite .*export") as error:
        engine(small, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [CacheConfig(16, 8, 8), CacheConfig(24, 8, 4)], ids=["budget", "chunk"])
def test_files_of_two_artefacts_are_refused(small: Artefact, other: CacheConfig) -> None:
    with pytest.raises(ArtefactError, match="files of two artefacts are mixed"):
        LiteRTEngine(small.folder, replace(small.manifest, cache=other), small.target)


def test_what_it_does_not_do_is_refused(small: Artefact) -> None:
    with pytest.raises(ConfigError, match="leave out --profile"):
        LiteRTEngine(small.folder, small.manifest, small.target, profile=True)
    with pytest.raises(ConfigError, match="threads is 0"):
        LiteRTEngine(small.folder, small.manifest, small.target, threads=0)
