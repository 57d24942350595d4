"""What the engine of host-evicted graphs does when something is wrong, and over a session."""

from __future__ import annotations

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import VOCAB, gated_model, random_tokens
from host_artefact import HostArtefact, make_host
from onnx_artefact import feed, make_artefact, same, spread_gates
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.errors import ArtefactError, ConfigError, StateError, TrimKVError
from trimkv_edge.runtime.engines import ENGINES, engine_class
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.session_file import Origin

CONFIG = CacheConfig(budget=12, buffer=4, prefill_chunk=4)
GRAPHS = ["host_decode.onnx", "host_prefill.onnx"]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> HostArtefact:
    return make_host(tmp_path_factory.mktemp("engine"), spread_gates(gated_model("llama-gqa")), CONFIG)


@pytest.mark.parametrize("name", [*GRAPHS, "host_weights.bin", "host_embedding.bin", "host.json"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "missing"])
def test_damaged_files_are_named_in_one_line(artefact: HostArtefact, tmp_path: Path, name: str, damage: str) -> None:
    if damage == "garbled" and name.endswith(".bin"):
        pytest.skip("any bytes are weights: the manifest's sha256 finds this")
    folder = shutil.copytree(artefact.folder, tmp_path / "broken")
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff" * len(content))
    told = r"host_?\w*\.\w+ .*export it again"
    if damage == "missing":
        told = rf"{name} is missing: export the artefact again"
    with pytest.raises(ArtefactError, match=told) as error:
        HostEvictedEngine(folder, artefact.manifest, artefact.target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other", [CacheConfig(16, 4, 4), CacheConfig(12, 4, 3)], ids=["another-budget", "another-chunk"]
)
def test_files_of_two_artefacts_are_refused(artefact: HostArtefact, other: CacheConfig) -> None:
    with pytest.raises(ArtefactError, match="files of two artefacts are mixed"):
        HostEvictedEngine(artefact.folder, replace(artefact.manifest, cache=other), artefact.target)


def test_constants_of_another_model_are_refused(artefact: HostArtefact, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact.folder, tmp_path / "mixed")
    constants = json.loads((folder / "host.json").read_text())
    constants["inverse_frequencies"] *= 2
    (folder / "host.json").write_text(json.dumps(constants))
    with pytest.raises(ArtefactError, match=r"host_decode\.onnx has cos of shape .* mixed"):
        HostEvictedEngine(folder, artefact.manifest, artefact.target)


def test_missing_onnxruntime_says_what_to_install(artefact: HostArtefact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("no module")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(TrimKVError, match=r"needs onnxruntime .*pip install 'trimkv-edge\[onnx\]'"):
        artefact.host()


def test_threads_and_shared_budgets_are_checked(artefact: HostArtefact) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        HostEvictedEngine(artefact.folder, artefact.manifest, artefact.target, threads=0)
    assert HostEvictedEngine(artefact.folder, artefact.manifest, artefact.target).threads >= 1
    shared = CacheConfig(12, 4, 4, policy="global", caps=((12, 12), (12, 12)))
    kind = engine_class("host-evicted", shared)
    with pytest.raises(ConfigError, match="a budget that heads share"):
        kind(artefact.folder, replace(artefact.manifest, cache=shared), artefact.target)
    assert ENGINES["host-evicted"].packages == ("onnxruntime",)


def test_refused_and_failed_steps_leave_the_stream_as_it_was(
    artefact: HostArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, untouched = artefact.host(), artefact.host()
    for each in (engine, untouched):
        feed(each, random_tokens(30), (4,))
    for bad in ([], [1] * 5, [-1], [10**6]):
        with pytest.raises(StateError):
            engine.prefill(bad)
    with pytest.raises(StateError):
        engine.evict()

    class Fails:
        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(engine._graphs, 1, replace(engine._graphs[1], session=Fails()))
        with pytest.raises(RuntimeError):
            engine.decode(5)
    assert (engine.seen, engine.live) == (untouched.seen, untouched.live)
    np.testing.assert_array_equal(engine.decode(5), untouched.decode(5))


def test_results_belong_to_the_caller(artefact: HostArtefact) -> None:
    engine = artefact.host()
    first = engine.decode(5)
    feed(engine, random_tokens(10), (4,))
    state, kept = engine.state(), engine.survivors()
    arrays = (first, state.key, state.value, state.log_beta, state.positions, kept)
    frozen = [array.copy() for array in arrays]
    feed(engine, random_tokens(40), (4, 1))
    for array, copy in zip(arrays, frozen, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_another_engine_has_a_cache_of_its_own(artefact: HostArtefact) -> None:
    first, alone = artefact.host(), artefact.host()
    feed(first, random_tokens(21, seed=3), (4,))
    second = first.another()
    assert (second.seen, second.live) == (0, 0)
    one, two = random_tokens(50, seed=1), random_tokens(50, seed=2)
    got: list[list[Any]] = [[], []]
    for start in range(0, 50, 10):
        got[0] += feed(first, one[start : start + 10], (3, 1))
        got[1] += feed(second, two[start : start + 10], (3, 1))
    want = []
    for start in range(0, 50, 10):
        want += feed(alone, two[start : start + 10], (3, 1))
    assert same(got[1], want)
    np.testing.assert_array_equal(second.survivors(), alone.survivors())


def test_a_profile_counts_both_graphs(artefact: HostArtefact) -> None:
    engine = HostEvictedEngine(artefact.folder, artefact.manifest, artefact.target, 1, profile=True)
    feed(engine, random_tokens(9), (4, 1))
    softmax = next(row for row in engine.profile_rows() if row.operator == "Softmax")
    assert softmax.calls == 2 * 3, "two layers, chunks of 4, 1 and 4"
    with pytest.raises(ConfigError, match="nothing was profiled"):
        engine.profile_rows()


def test_a_session_goes_on_in_the_onnx_engine(artefact: HostArtefact, tmp_path: Path) -> None:
    other = make_artefact(tmp_path / "onnx", artefact.model, CONFIG, "gqa")
    origin = Origin.of(artefact.manifest)

    def session(engine: Engine) -> Session:
        return Session(engine, byte_level(VOCAB), origin=origin)

    straight = session(artefact.host())
    straight.feed(random_tokens(45))
    want = [piece.token for piece in straight.generate(30)]
    current = session(artefact.host())
    current.feed(random_tokens(45))
    got = [piece.token for piece in current.generate(12)]
    for number, (engine, count) in enumerate([(other.onnx(), 10), (artefact.host(), 8)]):
        path = tmp_path / f"{number}.session"
        current.save(path)
        current = session(engine)
        current.load(path)
        got += [piece.token for piece in current.generate(count)]
    assert got == want
