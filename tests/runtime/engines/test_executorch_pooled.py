"""Opening ExecuTorch artefacts whose heads share a budget: what is mixed is refused in one line; engines are apart."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from executorch_pooled_artefact import CONFIGS, PooledArtefact, pooled_artefact
from factories import random_tokens
from onnx_artefact import feed

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, StateError
from trimkv_edge.runtime.engines import engine_class
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine
from trimkv_edge.runtime.engines.executorch_pooled import ExecuTorchPooledEngine
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.session_file import Origin

CONFIG = CONFIGS["portable"]


@pytest.fixture(scope="module")
def artefact() -> PooledArtefact:
    return pooled_artefact("portable")


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (replace(CONFIG, caps=((20, 5), (9, 16))), r"get_trimkv_caps = \[20, 5, 16, 9\], .* means \[20, 5, 9, 16\]"),
        (replace(CONFIG, policy="global"), "get_trimkv_pools = 2, but the manifest means 1"),
        (replace(CONFIG, threshold=0.03), "get_trimkv_threshold = 0.02, but the manifest means 0.03"),
        (replace(CONFIG, min_per_head=1), "get_trimkv_min_per_head = 0, but the manifest means 1"),
        (replace(CONFIG, buffer=5), "get_trimkv_buffer = 4, but the manifest means 5"),
    ],
)
def test_manifest_of_another_artefact(artefact: PooledArtefact, other: CacheConfig, fault: str) -> None:
    with pytest.raises(ArtefactError, match=fault):
        ExecuTorchPooledEngine(artefact.folder, replace(artefact.manifest, cache=other), artefact.target)


def test_manifest_of_an_artefact_with_a_budget_for_each_head(artefact: PooledArtefact) -> None:
    other = replace(artefact.manifest, cache=CacheConfig(11, 4, 3))
    with pytest.raises(ArtefactError, match=r"budget that heads share, .* files of two artefacts are mixed"):
        ExecuTorchEngine(artefact.folder, other, artefact.target)


def test_program_with_a_budget_for_each_head(artefact: PooledArtefact, tmp_path: Path) -> None:
    program = (artefact.folder / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(program.replace(b"read_lengths", b"read_nothing"))
    with pytest.raises(ArtefactError, match="has no method read_lengths: export it again"):
        ExecuTorchPooledEngine(tmp_path, artefact.manifest, artefact.target)


def test_the_registry_finds_the_class() -> None:
    assert engine_class("executorch", CONFIG) is ExecuTorchPooledEngine
    assert engine_class("executorch", CacheConfig(11, 4, 3)) is ExecuTorchEngine


def test_a_failed_step_is_not_counted(artefact: PooledArtefact) -> None:
    engine, plain = artefact.engine(), artefact.engine()
    tokens = random_tokens(40)
    for each in (engine, plain):
        feed(each, tokens[:20], (1,))
    with pytest.raises(StateError, match="ExecuTorch failed in forward"):
        engine._run("forward", engine._decode_inputs[:2])
    for each in (engine, plain):
        feed(each, tokens[20:], (1,))
    np.testing.assert_array_equal(engine.state().key, plain.state().key)


def test_two_engines_share_nothing(artefact: PooledArtefact) -> None:
    one, two, alone = (artefact.engine() for _ in range(3))
    mine, other = random_tokens(40), random_tokens(40, seed=1)
    for a, b in zip(mine, other, strict=True):
        for engine, token in ((one, a), (two, b)):
            if engine.room == 0:
                engine.evict()
            engine.decode(token)
    feed(alone, mine, (1,))
    np.testing.assert_array_equal(one.state().key, alone.state().key)
    np.testing.assert_array_equal(one.survivors(), alone.survivors())


def test_logits_and_lengths_are_the_callers_own(artefact: PooledArtefact) -> None:
    engine = artefact.engine()
    feed(engine, random_tokens(30), (1,))
    logits, kept = engine.decode(5), engine.kept
    copies = logits.copy(), kept.copy()
    feed(engine, random_tokens(20, seed=3), (1,))
    np.testing.assert_array_equal(logits, copies[0])
    np.testing.assert_array_equal(kept, copies[1])


def test_a_refused_state_changes_nothing(artefact: PooledArtefact) -> None:
    engine = artefact.engine()
    feed(engine, random_tokens(30), (3,))
    state = engine.state()
    with pytest.raises(StateError, match="no lengths"):
        engine.load_state(replace(state, lengths=None))
    np.testing.assert_array_equal(engine.state().key, state.key)


def test_importing_the_module_needs_no_torch() -> None:
    code = "import sys; import trimkv_edge.runtime.engines.executorch_pooled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_a_saved_session_goes_on_in_the_eager_engine_and_back(artefact: PooledArtefact, tmp_path: Path) -> None:
    stream, origin = random_tokens(70, 3), Origin.of(artefact.manifest)
    whole = Session(artefact.eager())
    whole.feed(stream)
    relay = Session(artefact.engine(), origin=origin)
    for start, following in ((0, artefact.eager), (23, artefact.engine), (46, artefact.eager)):
        relay.feed(stream[start : start + 23])
        relay.save(tmp_path / "s")
        held = relay.engine.state()
        relay = Session(following(), origin=origin)
        relay.load(tmp_path / "s")
        found = relay.engine.state()
        for name in ("key", "value", "log_beta", "positions", "lengths"):
            np.testing.assert_array_equal(getattr(found, name), getattr(held, name))
    relay.feed(stream[69:])
    np.testing.assert_array_equal(relay.engine.survivors(), whole.engine.survivors())
