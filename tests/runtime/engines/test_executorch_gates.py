"""Gates of ExecuTorch programs, which read many tokens at once: the same log-betas, whenever they are read."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executorch_artefact import ExecuTorchArtefact, make_executorch
from executorch_pooled_artefact import PooledArtefact
from factories import gated_model, random_tokens
from onnx_artefact import spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.errors import ArtefactError, StateError
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine, ExecuTorchProgram

CAPS = ((24, 14), (16, 20))
FORMS = {
    "short": ("xnnpack", CacheConfig(budget=12, buffer=6, prefill_chunk=5)),
    "portable": ("portable", CacheConfig(budget=12, buffer=6, prefill_chunk=5)),
    # More tokens between events than rows that wait.
    "long": ("xnnpack", CacheConfig(budget=20, buffer=270, prefill_chunk=5)),
    "one by one": ("portable", CacheConfig(budget=20, buffer=140, prefill_chunk=1)),
    "one": ("xnnpack", CacheConfig(budget=6, buffer=1, prefill_chunk=1)),
    "shared": ("xnnpack", CacheConfig(14, 6, 6, "global", caps=CAPS)),
    "shared, long": ("portable", CacheConfig(14, 150, 6, "layer", caps=CAPS)),
}
MIXES = {"steps": (1,), "chunks": (5, 3), "both": (1, 1, 4, 1, 1, 1, 2, 1, 5, 1)}
_FOLDER = tempfile.TemporaryDirectory(prefix="trimkv-test-")


@cache
def exported(form: str) -> ExecuTorchArtefact:
    ops, config = FORMS[form]
    model = spread_gates(gated_model("qwen3-gqa", "rg10" if "o" in form else "rg"))
    made = make_executorch(Path(_FOLDER.name) / form, model, config, ops)
    return PooledArtefact(**vars(made)) if config.caps else made


@pytest.fixture(params=FORMS)
def made(request: pytest.FixtureRequest) -> ExecuTorchArtefact:
    return exported(request.param)


class Counted:
    """Calls of an engine's methods by name; those in ``broken`` fail."""

    def __init__(self, engine: ExecuTorchProgram) -> None:
        self.calls, self.broken = Counter[str](), set[str]()
        self.engine, self.run = engine, engine._run
        engine._run = self  # type: ignore[method-assign, assignment]

    def __call__(self, name: str, inputs: tuple[Any, ...] = ()) -> list[Any]:
        if name in self.broken:
            # With all that it writes written; then ExecuTorch's own refusal, since an input is missing.
            self.run(name, inputs)
            return self.run(name, inputs[:-1])
        self.calls[name] += 1
        return self.run(name, inputs)


def chunks(config: CacheConfig, sizes: tuple[int, ...], total: int) -> Iterator[list[int]]:
    tokens = random_tokens(total)
    start = turn = 0
    while start < total:
        count = min(sizes[turn % len(sizes)], config.prefill_chunk)
        yield tokens[start : start + count]
        start, turn = start + count, turn + 1


def feed_both(engines: tuple[Engine, ...], tokens: list[int]) -> bool:
    """Whether there was an event, after which both hold the same entries."""
    event = False
    while tokens:
        if engines[0].room == 0:
            for engine in engines:
                engine.evict()
                np.testing.assert_array_equal(engines[0].survivors(), engine.survivors())
            event = True
        count = min(engines[0].room, engines[0].config.prefill_chunk)
        part, tokens = tokens[:count], tokens[count:]
        want, *got = (engine.prefill(part) for engine in engines)
        assert all(np.abs(logits - want).max() <= 1e-4 for logits in got)
    return event


def check_log_betas(eager: Engine, engine: Engine) -> None:
    want, got = eager.state(), engine.state()
    live = want.positions >= 0
    np.testing.assert_array_equal(want.positions, got.positions)
    np.testing.assert_allclose(got.log_beta[live], want.log_beta[live], rtol=1e-4, atol=1e-9)
    assert len(np.unique(want.log_beta[live])) > 0.5 * live.sum(), "gates that say the same everywhere prove nothing"


@pytest.mark.parametrize("mix", MIXES)
def test_log_betas_are_eagers_whenever_they_are_read(made: ExecuTorchArtefact, mix: str) -> None:
    config = made.manifest.cache
    eager, read_often, read_late = made.eager(), made.engine(), made.engine()
    events, total = 0, config.slots + 2 * config.buffer + 7
    for number, tokens in enumerate(chunks(config, MIXES[mix], total)):
        events += feed_both((eager, read_often, read_late), tokens)
        if number % 7 == 5 and number < 60:
            check_log_betas(eager, read_often)
    assert events >= 2
    for engine in (read_late, read_often):
        check_log_betas(eager, engine)


def test_gates_run_only_when_they_must(made: ExecuTorchArtefact) -> None:
    engine, config = made.engine(), made.manifest.cache
    counted = Counted(engine)
    for token in random_tokens(config.slots):
        while engine.room == 0:
            engine.evict()
        engine.decode(token)
    while engine.room:
        engine.decode(3)
    before = counted.calls["gates"]
    engine.evict()
    for token in random_tokens(config.buffer):
        engine.decode(token)
    engine.evict()
    rows = min(128, config.buffer)
    # Rows of the first buffer waited at the first event, those of the second were read when they were full or needed.
    assert counted.calls["gates"] - before == 1 + -(-config.buffer // rows)
    engine.decode(5)
    engine.state()
    engine.state()
    assert counted.calls["gates"] - before == 2 + -(-config.buffer // rows)


def test_a_state_saved_while_rows_wait_goes_on_elsewhere(made: ExecuTorchArtefact) -> None:
    config = made.manifest.cache
    eager, one, other = made.eager(), made.engine(), made.engine()
    total = config.slots + config.buffer
    parts = list(chunks(config, MIXES["both"], total))
    for tokens in parts[: len(parts) // 2]:
        feed_both((eager, one), tokens)
    feed_both((other,), random_tokens(5, seed=9))  # rows of another stream wait there
    assert other._gate_rows.waiting
    assert one._gate_rows.waiting
    other.load_state(one.state())
    assert (one._gate_rows.waiting, other._gate_rows.waiting) == (0, 0)
    assert sum(feed_both((eager, one, other), tokens) for tokens in parts[len(parts) // 2 :])
    for engine in (one, other):
        check_log_betas(eager, engine)


@pytest.mark.parametrize("ending", ["reset", "load_state"])
def test_rows_of_another_stream_are_forgotten(made: ExecuTorchArtefact, ending: str) -> None:
    eager, engine, config = made.eager(), made.engine(), made.manifest.cache
    feed_both((engine,), random_tokens(config.segment(first=True) if config.caps else 6, seed=4))
    if ending == "reset":
        engine.reset()
    else:
        engine.load_state(eager.state())
    assert engine._gate_rows.waiting == 0
    for tokens in chunks(config, MIXES["both"], 9):
        feed_both((eager, engine), tokens)
    check_log_betas(eager, engine)


@pytest.mark.parametrize("broken", ["forward", "gates"])
def test_a_failure_leaves_all_as_it_was(made: ExecuTorchArtefact, broken: str) -> None:
    eager, engine, config = made.eager(), made.engine(), made.manifest.cache
    counted = Counted(engine)
    actions = {"forward": [lambda: engine.decode(8)], "gates": [engine.state, engine.evict]}[broken]
    for turn, tokens in enumerate(chunks(config, (1,), config.slots + config.buffer)):
        feed_both((eager, engine), tokens)
        full = engine.room == 0
        if full == (broken == "gates") and (full or turn % 3 == 0):
            assert engine._gate_rows.waiting
            before = engine.seen, engine.live, engine.room, engine.survivors().tolist()
            waiting = 0 if broken == "forward" and engine._gate_rows.due(1) else engine._gate_rows.waiting
            counted.broken = {broken}
            for action in actions:
                with pytest.raises(StateError, match=f"ExecuTorch failed in {broken} .*repeat it or reset"):
                    action()
            assert (engine.seen, engine.live, engine.room, engine.survivors().tolist()) == before
            assert engine._gate_rows.waiting == waiting
            counted.broken = set()
    check_log_betas(eager, engine)


def test_a_chunk_whose_rows_must_be_read_first_fails_with_the_gates() -> None:
    made = exported("short")
    eager, engine = made.eager(), made.engine()
    counted = Counted(engine)
    for each in (eager, engine):
        each.decode(5)
    counted.broken = {"gates"}
    with pytest.raises(StateError, match="ExecuTorch failed in gates"):
        engine.prefill([6, 7])
    counted.broken = set()
    for each in (eager, engine):
        each.prefill([6, 7])
    check_log_betas(eager, engine)


def renamed(made: ExecuTorchArtefact, folder: Path) -> Path:
    """The artefact's program with another name for its gates, as if it had none."""
    data = (made.folder / "model.pte").read_bytes()
    name = b"\5\0\0\0gates\0"
    assert data.count(name) == 1
    (folder / "model.pte").write_bytes(data.replace(name, name.replace(b"gates", b"fates")))
    return folder


@pytest.mark.parametrize("form", ["short", "shared"])
def test_a_program_without_gates_is_refused(form: str, tmp_path: Path) -> None:
    made = exported(form)
    kind = type(made.engine())
    with pytest.raises(ArtefactError, match=r"model\.pte has no method gates: export it again with this version") as e:
        kind(renamed(made, tmp_path), made.manifest, made.target)
    assert "\n" not in str(e.value)


def test_files_of_two_artefacts_are_refused() -> None:
    made = exported("short")
    others = {
        r"has gates, but the manifest means none: .* export it again": replace(
            made.manifest, gates=replace(made.manifest.gates, kind="none")
        ),
        "get_trimkv_hidden_size = 64, but the manifest means 96": replace(
            made.manifest, model=replace(made.manifest.model, hidden_size=96)
        ),
    }
    for fault, manifest in others.items():
        with pytest.raises(ArtefactError, match=fault):
            ExecuTorchEngine(made.folder, manifest, made.target)


def test_rows_of_two_engines_are_apart() -> None:
    made = exported("shared")
    eager, one = made.eager(), made.engine()
    other = one.another()
    for token in random_tokens(20):
        feed_both((eager, one), [token])
        feed_both((other,), [token ^ 1])
    check_log_betas(eager, one)


def test_a_profile_has_the_gates() -> None:
    """Programs take log1p in gates only."""
    made = exported("portable")
    engine = ExecuTorchEngine(made.folder, made.manifest, made.target, 1, profile=True)
    for token in random_tokens(12 + 6):
        engine.decode(token)
    engine.evict()
    engine.decode(3)
    rows = {row.operator: row.calls for row in engine.profile_rows()}
    assert rows["log1p.out"] == 3  # 6 + 6 + 6 tokens
