"""Going back to marked places: what follows is what followed then, whatever was evicted in between."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from factories import gated_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_engine import DIM, HEADS, LAYERS, VOCAB, NumpyEngine

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState
from trimkv_edge.errors import ConfigError, SessionError, StateError
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session

CONFIG = CacheConfig(budget=8, buffer=6, prefill_chunk=4)
DRAW = SamplingParams(temperature=20.0, repetition_penalty=1.2, seed=5)  # hot: cool draws hardly ever differ
MODEL = gated_model("qwen3-gqa", "rg10")
STRICT = SamplingParams(repetition_penalty=1e6)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, count)]


def session(**options: Any) -> Session:
    return Session(NumpyEngine(CONFIG), **options)


def fed(stream: list[int]) -> Session:
    """A session that was given a stream at once: what a rewound one has to be like."""
    run = session()
    if stream:
        run.feed(stream)
    return run


def assert_same(one: CacheState, other: CacheState) -> None:
    assert (one.seen, one.fill) == (other.seen, other.fill)
    for name in ("positions", "key", "value", "log_beta", "lengths"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def assert_stands_at(run: Session, stream: list[int], pending: int | None) -> None:
    read = stream if pending is None else stream[:-1]
    assert run.pending == pending
    fresh = fed(read)
    assert_same(run.engine.state(), fresh.engine.state())
    np.testing.assert_array_equal(run.logits, fresh.logits)
    assert run.tokens is not None
    assert run.tokens.tolist() == read


# Each turn: what is read, what is generated, and how many turns are then taken back. Never loose steps in any order:
# then hardly an example goes back at all.
TURNS = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 12), st.sampled_from([1, 0, 2, 3])), min_size=2, max_size=7
)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, limit=st.integers(1, 4), penalised=st.booleans())
def test_a_rewound_session_is_one_that_never_went_on(
    turns: list[tuple[int, int, int]], limit: int, penalised: bool
) -> None:
    run = session(checkpoints=limit, note_tokens=True)
    stream: list[int] = []
    marks: list[tuple[list[int], int | None]] = []
    for turn, (given_, made, back) in enumerate(turns):
        run.checkpoint()
        marks = [*marks, (stream, run.pending)][-limit:]
        run.feed(tokens(given_, turn))
        stream = stream + tokens(given_, turn)
        stream = stream + [piece.token for piece in run.generate(made, DRAW)]
        if back > len(marks):
            before = run.engine.state()
            with pytest.raises(SessionError, match=rf"{len(marks)} are held \(at most {limit}\)"):
                run.rewind(back)
            assert_same(run.engine.state(), before)
        elif back:
            run.rewind(back)
            stream, pending = marks[-back]
            marks = marks[:-back]
            assert_stands_at(run, stream, pending)
        if stream and turn % 2:
            # The penalty sees which tokens the stream holds: those that were taken back must be gone.
            sampling = STRICT if penalised else DRAW
            more = [piece.token for piece in run.generate(5, sampling)]
            assert more == [piece.token for piece in fed(stream).generate(5, sampling)]
            stream = stream + more


@pytest.mark.parametrize("length", [4, 30])
def test_a_generation_goes_on_drawing_from_where_it_was_marked(length: int) -> None:
    whole = session()
    whole.feed(tokens(5))
    want = [piece.token for piece in whole.generate(12 + length, DRAW)]
    run = session()
    run.feed(tokens(5))
    generation = run.generate(100, DRAW)
    assert [piece.token for piece in islice(generation, 12)] == want[:12]
    run.checkpoint()
    assert [piece.token for piece in islice(generation, length)] == want[12:]
    run.rewind()
    assert run.sampler is not None
    assert [piece.token for piece in run.generate(length, run.sampler)] == want[12:]


def test_places_within_the_ring_cost_no_copy_and_those_behind_an_event_share_one() -> None:
    run = session()
    run.feed(tokens(20))  # 8 kept of the first 14, 6 of the next
    assert run.statistics().checkpoint_bytes == 0
    numbers = VOCAB // 8 + VOCAB * 4
    run.checkpoint()
    run.feed(tokens(2, 1))
    run.checkpoint()
    assert run.statistics().checkpoint_bytes == 2 * numbers
    run.feed(tokens(30, 2))  # five events
    entries = LAYERS * HEADS * 10  # what the younger place needs: the older one's are a prefix
    copy = entries * (2 * DIM * 4 + 4 + 8)
    assert run.statistics().checkpoint_bytes == 2 * numbers + copy
    run.rewind()
    run.rewind()
    assert run.statistics().checkpoint_bytes == 0
    assert_same(run.engine.state(), fed(tokens(20)).engine.state())


def test_who_marks_nothing_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(self: NumpyEngine) -> CacheState:
        raise AssertionError("the cache was copied")

    monkeypatch.setattr(NumpyEngine, "state", copied)
    run, off = session(), session(checkpoints=0)
    off.checkpoint()
    for each in (run, off):
        each.feed(tokens(60))
        list(each.generate(30))
    with pytest.raises(SessionError, match="keeps no checkpoints: open it with checkpoints=K"):
        off.rewind()


def test_the_oldest_place_goes_and_the_reason_is_told() -> None:
    run = session(checkpoints=2)
    for turn in range(3):
        run.checkpoint()
        run.feed(tokens(9, turn))
    with pytest.raises(SessionError, match=r"back 3 turns .*: 3 were marked .* newest 2 are held .*evicted: go back"):
        run.rewind(3)
    run.rewind(2)
    assert_same(run.engine.state(), fed(tokens(9)).engine.state())
    run.checkpoint()
    run.reset()
    with pytest.raises(SessionError, match="0 were marked"):
        run.rewind()


def test_going_back_to_the_start() -> None:
    run = session()
    run.checkpoint()
    run.feed(tokens(40))
    run.rewind()
    assert (run.engine.seen, run.logits, run.pending) == (0, None, None)
    with pytest.raises(ConfigError, match="feed a prompt"):
        run.generate(1)
    run.feed(tokens(20, 1))
    assert_same(run.engine.state(), fed(tokens(20, 1)).engine.state())


@pytest.mark.parametrize("bad", [0, -1, True, 1.5])
def test_wrong_numbers_are_refused(bad: Any) -> None:
    run = session()
    run.checkpoint()
    with pytest.raises(ConfigError, match="turns is"):
        run.rewind(bad)
    if bad != 0:
        with pytest.raises(ConfigError, match="checkpoints is"):
            session(checkpoints=bad)


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    back=st.integers(1, 5),
    policy=st.sampled_from(["global", "layer", "trimkv"]),
)
def test_budgets_that_heads_share_go_back_too(turns: list[int], back: int, policy: str) -> None:
    """Fed one by one, so that chunks never differ."""
    config = CacheConfig(6, 4, 1, policy)
    run, fresh = (Session(eager_engine(MODEL, config)) for _ in range(2))
    stream, marks = [], []
    for turn, count in enumerate(turns):
        run.checkpoint()
        marks.append(stream)
        stream = stream + random_tokens(count, turn)
        run.feed(stream[-count:])
    back = min(back, len(turns))
    run.rewind(back)
    if marks[-back]:
        fresh.feed(marks[-back])
    assert_same(run.engine.state(), fresh.engine.state())
    for each in (run, fresh):
        each.feed(random_tokens(15, 99))
    assert_same(run.engine.state(), fresh.engine.state())
    np.testing.assert_array_equal(run.logits, fresh.logits)


def test_policies_that_look_at_past_attention_do_not_go_back() -> None:
    run = Session(eager_engine(MODEL, CacheConfig(6, 4, 3, "h2o")))
    run.feed(random_tokens(20))
    run.checkpoint()
    run.feed(random_tokens(3))
    before = run.logits
    with pytest.raises(StateError, match="h2o needs the attention of the past"):
        run.rewind()
    assert run.engine.seen == 23
    assert run.logits is before
