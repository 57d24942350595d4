"""Gates that read many tokens at once, in ONNX Runtime: the same log-betas, in fewer calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import gated_model, random_tokens
from onnx_artefact import Artefact, make_artefact, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError
from trimkv_edge.runtime.engines.gate_rows import GateRows
from trimkv_edge.runtime.engines.onnx import OnnxEngine
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine

FORMS = {
    "short": CacheConfig(budget=12, buffer=6, prefill_chunk=5),
    # More tokens between events than rows that wait.
    "long": CacheConfig(budget=20, buffer=300, prefill_chunk=5),
    "one": CacheConfig(budget=6, buffer=1, prefill_chunk=1),
    "shared": CacheConfig(14, 6, 6, "global", caps=((24, 14), (16, 20))),
}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    return make_artefact(tmp_path_factory.mktemp(request.param), model, FORMS[request.param])


def opened(artefact: Artefact, *, aliased: bool = True) -> OnnxEngine:
    kind = OnnxEngine if artefact.manifest.cache.caps is None else OnnxPooledEngine
    return kind(artefact.folder, artefact.manifest, artefact.target, 1, aliased=aliased)


class Counted:
    """A session that counts its runs, or fails."""

    def __init__(self, session: Any) -> None:
        self.session, self.runs, self.broken = session, 0, False

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        if self.broken:
            raise RuntimeError("out of memory")
        self.runs += 1
        self.session.run_with_iobinding(binding)


def sizes(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.choice([1, 1, 1, 1, 1, 1, 1, 2, 3, 5]))


def step(engine: Any, tokens: list[int]) -> None:
    if engine.room == 0:
        engine.evict()
    engine.prefill(tokens)


@pytest.mark.parametrize("aliased", [True, False])
def test_log_betas_are_eagers_whenever_they_are_read(made: Artefact, aliased: bool) -> None:
    eager, exported = eager_of(made), opened(made, aliased=aliased)
    tokens, start, events = random_tokens(400), 0, 0
    for number, size in enumerate(sizes(3)):
        if eager.room == 0:
            eager.evict()
            exported.evict()
            events += 1
            np.testing.assert_array_equal(eager.survivors(), exported.survivors())
        count = min(size, made.manifest.cache.prefill_chunk, eager.room, len(tokens) - start)
        if not count:
            break
        for engine in (eager, exported):
            engine.prefill(tokens[start : start + count])
        start += count
        if number % 7 == 0:
            check(eager, exported)
    assert events >= 1
    check(eager, exported)


def eager_of(made: Artefact) -> Any:
    from trimkv_edge.models.eager import eager_engine

    return eager_engine(made.model, made.manifest.cache)


def check(eager: Any, exported: Any) -> None:
    want, got = eager.state(), exported.state()
    live = want.positions >= 0
    assert np.array_equal(want.positions, got.positions)
    np.testing.assert_allclose(want.log_beta[live], got.log_beta[live], rtol=1e-4, atol=1e-9)
    assert len(np.unique(got.log_beta[live])) > 0.5 * live.sum(), "gates that say the same everywhere prove nothing"


def test_gates_run_once_per_event(made: Artefact) -> None:
    engine = opened(made)
    engine._gates = gates = Counted(engine._gates)
    cache, events, steps = made.manifest.cache, 0, 0
    while events < 3:
        if engine.room == 0:
            engine.evict()
            events += 1
            steps = 0
            continue
        engine.decode(5)
        steps += 1
    # Rows that are full are read between events too; before the first event the budget fills up.
    first = -(-(cache.slots if cache.caps is None else engine.config.segment(first=True)) // cache.gate_rows)
    assert gates.runs <= first + events * -(-cache.buffer // cache.gate_rows) + 3
    before = gates.runs
    engine.decode(6)
    engine.state()
    engine.state()
    assert gates.runs == before + 1
    assert engine._gate_rows is not None
    assert engine._gate_rows.rows.shape[1] == cache.gate_rows <= max(cache.prefill_chunk, 128)


def test_a_failing_gate_leaves_all_as_it_was(made: Artefact) -> None:
    engine, untouched = opened(made), opened(made)
    engine._gates = gates = Counted(engine._gates)
    for token in random_tokens(made.manifest.cache.slots + 3):
        for each in (engine, untouched):
            step(each, [token])
    while engine.room:
        for each in (engine, untouched):
            each.decode(9)
    gates.broken = True
    for action in (engine.evict, engine.state):
        with pytest.raises(RuntimeError, match="out of memory"):
            action()
    assert (engine.seen, engine.live) == (untouched.seen, untouched.live)
    gates.broken = False
    for each in (engine, untouched):
        each.evict()
    assert np.array_equal(engine.survivors(), untouched.survivors())
    assert np.array_equal(engine.decode(4), untouched.decode(4))


def test_a_failing_step_does_not_count_its_row(made: Artefact) -> None:
    engine, untouched = opened(made), opened(made)
    for each in (engine, untouched):
        each.decode(3)
    decoder, engine._decoder = engine._decoder, Counted(engine._decoder)
    engine._decoder.broken = True
    if engine.room == 0:
        engine.evict()
        untouched.evict()
    with pytest.raises(RuntimeError):
        engine.decode(8)
    engine._decoder = decoder
    for each in (engine, untouched):
        each.decode(4)
    np.testing.assert_array_equal(engine.state().log_beta, untouched.state().log_beta)


@pytest.mark.parametrize("ending", ["reset", "load_state"])
def test_rows_of_another_stream_are_forgotten(made: Artefact, ending: str) -> None:
    engine, fresh = opened(made), opened(made)
    for token in (4, 5, 6):
        step(engine, [token])
    if ending == "reset":
        engine.reset()
    else:
        step(fresh, [9])
        engine.load_state(fresh.state())
    for each in (engine, fresh):
        step(each, [7])
    for name in ("positions", "log_beta", "key"):
        np.testing.assert_array_equal(getattr(engine.state(), name), getattr(fresh.state(), name))


def test_an_artefact_without_its_gates_is_refused(made: Artefact) -> None:
    files = {role: name for role, name in made.target.files.items() if role != "gates"}
    with pytest.raises(ArtefactError, match=r"past.log_beta .* export it again"):
        opened(replace(made, target=replace(made.target, files=files)))


def test_policies_without_gates_have_no_graph_for_them(tmp_path: Path) -> None:
    from trimkv_edge.retention import NoGate

    model = gated_model("llama-gqa")
    for layer in model.base.model.layers:
        layer.self_attn.retention_gate = NoGate(2)
    artefact = make_artefact(tmp_path, model, CacheConfig(12, 4, 4, "streaming"))
    assert "gates" not in artefact.target.files
    eager, engine = artefact.eager(), artefact.onnx()
    for token in random_tokens(40):
        for each in (eager, engine):
            step(each, [token])
    np.testing.assert_array_equal(eager.survivors(), engine.survivors())


def test_rows_wait_until_there_is_no_place() -> None:
    rows = GateRows(2, 4, CacheConfig(budget=8, buffer=6, prefill_chunk=3))
    assert rows.rows.shape == (2, 6, 4)
    assert not rows.due(1)
    assert not rows.due(3)
    rows.waiting = 5
    assert not rows.due(1)
    assert rows.due(2)  # chunks lie from the first row on
    rows.waiting = 6
    assert rows.due(1)


@pytest.mark.parametrize(
    ("buffer", "chunk", "want"), [(1, 1, 1), (16, 4, 16), (128, 128, 128), (500, 20, 128), (500, 300, 300)]
)
def test_how_many_rows(buffer: int, chunk: int, want: int) -> None:
    assert CacheConfig(budget=600, buffer=buffer, prefill_chunk=chunk).gate_rows == want
