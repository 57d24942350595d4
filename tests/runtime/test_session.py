"""A session over a real cache: chunking, events, generation, and a state that is right after every end."""

from __future__ import annotations

import signal
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_engine import VOCAB, NumpyEngine
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, PositionLimitError
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session

CONFIG = CacheConfig(budget=8, buffer=6, prefill_chunk=4)
DRAW = SamplingParams(temperature=1.0, seed=5)
TOKENIZER = byte_level(VOCAB)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, count)]


def session(config: CacheConfig = CONFIG, **settings_: int) -> Session:
    return Session(NumpyEngine(config, **settings_), TOKENIZER)


def one_by_one(stream: list[int], config: CacheConfig = CONFIG) -> NumpyEngine:
    """What the cache must hold: one token per step, an event right after the step that fills the ring."""
    engine = NumpyEngine(config)
    for token in stream:
        engine.decode(token)
        if engine.live == config.slots:
            engine.evict()
    return engine


def assert_same(one: NumpyEngine, other: NumpyEngine) -> None:
    first, second = one.state(), other.state()
    assert first.seen == second.seen
    np.testing.assert_array_equal(first.positions, second.positions)
    np.testing.assert_array_equal(first.key, second.key)
    np.testing.assert_array_equal(first.log_beta, second.log_beta)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59)),
    shape=st.tuples(st.integers(4, 9), st.integers(1, 7), st.integers(1, 7)),
)
def test_any_chunking_gives_the_same_survivors_and_logits(
    count: int, cuts: set[int], shape: tuple[int, int, int]
) -> None:
    budget, buffer, chunk = shape
    config = CacheConfig(budget=max(budget, chunk), buffer=max(buffer, chunk), prefill_chunk=chunk)
    stream = tokens(count)
    borders = sorted({0, count, *(cut for cut in cuts if cut < count)})
    parts = session(config)
    for start, end in pairwise(borders):
        parts.feed(stream[start:end])
    whole = session(config)
    whole.feed(stream)
    plain = one_by_one(stream, config)
    assert_same(parts.engine, plain)  # type: ignore[arg-type]
    assert_same(whole.engine, plain)  # type: ignore[arg-type]
    np.testing.assert_array_equal(parts.logits, whole.logits)
    assert whole.engine.room > 0


def test_events_run_right_after_the_step_that_fills_the_ring() -> None:
    run = session()
    run.feed(tokens(13))
    assert (run.engine.live, run.statistics().events) == (13, 0)
    run.feed(tokens(1))
    assert (run.engine.live, run.statistics().events) == (8, 1)
    run.feed(tokens(6 * 4))
    assert (run.engine.live, run.statistics().events) == (8, 5)


def test_progress_reports_chunks_that_end_where_the_ring_is_full() -> None:
    calls: list[tuple[int, int]] = []
    session().feed(tokens(18), lambda done, total: calls.append((done, total)))
    assert calls == [(done, 18) for done in (0, 4, 8, 12, 14, 18)]


@settings(max_examples=30, deadline=None)
@given(prompt=st.integers(1, 20), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), more=st.integers(1, 5))
def test_generated_tokens_are_part_of_the_stream_however_generation_ends(
    prompt: int, lengths: list[int], more: int
) -> None:
    run = session()
    run.feed(tokens(prompt))
    stream = tokens(prompt)
    for turn, length in enumerate(lengths):
        stream += [piece.token for piece in islice(run.generate(30, DRAW), length)]  # abandoned in the middle
        if turn % 2:
            run.feed(tokens(more, turn))
            stream += tokens(more, turn)
    run.feed(tokens(1, 99))
    stream += tokens(1, 99)
    assert run.pending is None
    assert_same(run.engine, one_by_one(stream))  # type: ignore[arg-type]


def test_two_generations_in_a_row_equal_one() -> None:
    one, two = session(), session()
    for run in (one, two):
        run.feed(tokens(5))
    whole = [piece.token for piece in one.generate(20)]
    parts = [piece.token for piece in two.generate(7)]
    assert two.pending == parts[-1]
    assert [*parts, *(piece.token for piece in two.generate(13))] == whole
    assert whole == greedy(tokens(5), 20)


def greedy(stream: list[int], count: int) -> list[int]:
    engine, new = NumpyEngine(CONFIG), []
    for token in stream:
        logits = engine.decode(token)
        if engine.room == 0:
            engine.evict()
    for _ in range(count):
        new.append(int(np.argmax(logits)))
        logits = engine.decode(new[-1])
        if engine.room == 0:
            engine.evict()
    return new


def test_a_seed_repeats_a_generation() -> None:
    runs = []
    for _ in range(2):
        run = session()
        run.feed(tokens(5))
        runs.append([piece.token for piece in run.generate(20, DRAW)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5


def test_pieces_join_to_the_decoded_tokens() -> None:
    run = session()
    run.feed(TOKENIZER.encode("the cat ").ids)
    pieces = list(run.generate(50, DRAW))
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode([piece.token for piece in pieces])


def test_a_stop_id_ends_after_its_piece_and_stays_pending() -> None:
    run = session()
    run.feed(tokens(5))
    free = [piece.token for piece in run.generate(20, DRAW)]
    run = session()
    run.feed(tokens(5))
    pieces = list(run.generate(20, DRAW, stop_ids=[free[6]]))
    end = free.index(free[6]) + 1
    assert [piece.token for piece in pieces] == free[:end]
    assert run.pending == free[6]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(free[: end - 1])


def test_a_stop_string_cuts_the_text_and_ends_the_generation() -> None:
    run = session()
    run.feed(tokens(5))
    text = "".join(piece.text for piece in run.generate(60, DRAW))
    stop = text[30:33]
    run = session()
    run.feed(tokens(5))
    pieces = list(run.generate(60, DRAW, stop_strings=[stop]))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert len(pieces) < 60


def test_the_repetition_penalty_covers_prompt_and_new_tokens() -> None:
    run = session()
    run.feed(tokens(5))
    free = [piece.token for piece in run.generate(12)]
    assert len(set(free)) < 12
    run.reset()
    run.feed(tokens(5))
    strong = [piece.token for piece in run.generate(12, SamplingParams(repetition_penalty=1e6))]
    assert len({*strong, *tokens(5)}) == 17


def test_zero_new_tokens_give_nothing() -> None:
    run = session()
    run.feed(tokens(3))
    assert list(run.generate(0)) == []
    assert run.pending is None


def test_reset_starts_the_same_stream_again() -> None:
    run = session()
    run.feed(tokens(30))
    first = list(run.generate(10))
    run.reset()
    assert run.logits is None
    run.feed(tokens(30))
    assert list(run.generate(10)) == first
    assert run.statistics().prompt_tokens == 30


@pytest.mark.parametrize(
    ("bad", "message"),
    [([], "empty"), ([1.5], "whole numbers"), ([-1], "token id -1"), ([5, VOCAB], f"token id {VOCAB}")],
)
def test_wrong_tokens_are_refused_and_nothing_is_read(bad: list[int], message: str) -> None:
    run = session()
    run.feed(tokens(3))
    with pytest.raises(ConfigError, match=message):
        run.feed(bad)
    assert_same(run.engine, one_by_one(tokens(3)))  # type: ignore[arg-type]


def test_generating_without_a_prompt_or_with_wrong_settings_is_refused_at_the_call() -> None:
    run = session()
    with pytest.raises(ConfigError, match="feed a prompt"):
        run.generate(5)
    run.feed(tokens(3))
    with pytest.raises(ConfigError, match="max new tokens is -1"):
        run.generate(-1)
    plain = Session(NumpyEngine(CONFIG))
    plain.feed(tokens(3))
    with pytest.raises(ConfigError, match="tokenizer"):
        plain.generate(5, stop_strings=["x"])


def test_a_prompt_past_the_position_limit_is_refused_before_anything_is_read() -> None:
    run = session(position_limit=20)
    run.feed(tokens(3))
    with pytest.raises(PositionLimitError, match=r"pass the last position .*\(19\)"):
        run.feed(tokens(18))
    assert_same(run.engine, one_by_one(tokens(3)))  # type: ignore[arg-type]
    run.feed(tokens(17))
    assert run.engine.seen == 20


def test_the_position_limit_says_what_sets_it() -> None:
    run = Session(NumpyEngine(CONFIG, position_limit=20), limit_hint="short factors; export again, ")
    run.feed(tokens(19))
    with pytest.raises(
        PositionLimitError, match=r"^2 more after 19 tokens pass .*\(19\): short factors; export again, "
    ):
        run.feed(tokens(2))
    generation = run.generate(50)
    assert len(list(islice(generation, 2))) == 2
    with pytest.raises(PositionLimitError, match=r"^1 more after 20 tokens pass .*: short factors; export again, "):
        next(generation)


def test_generation_reaches_the_position_limit_with_all_its_text_and_a_clean_state() -> None:
    run = session(position_limit=20)
    run.feed(tokens(10))
    generation = run.generate(50, DRAW)
    pieces = list(islice(generation, 11))
    with pytest.raises(PositionLimitError):
        next(generation)  # the eleventh needs no position of its own, the twelfth would
    made = [piece.token for piece in pieces]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(made)
    assert run.pending == made[-1]
    assert_same(run.engine, one_by_one([*tokens(10), *made[:-1]]))  # type: ignore[arg-type]
    with pytest.raises(PositionLimitError):
        run.feed(tokens(1))
    run.reset()
    run.feed(tokens(3))
    assert_same(run.engine, one_by_one(tokens(3)))  # type: ignore[arg-type]


class Interrupting(NumpyEngine):
    """Ctrl-C comes inside the first event, when rows were moved and the new length is not noted yet."""

    interrupted = False

    def _evict(self, seen: int) -> None:
        super()._evict(seen)
        if not self.interrupted:
            self.interrupted = True
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_inside_an_event_takes_effect_after_it() -> None:
    run = Session(Interrupting(CONFIG))
    run.feed(tokens(12))
    generation = run.generate(10)
    made = [next(generation).token, next(generation).token]
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert run.engine.live == CONFIG.budget
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run.feed(tokens(20, 1))
    assert_same(run.engine, one_by_one([*tokens(12), *made, *tokens(20, 1)]))  # type: ignore[arg-type]


def test_passing_the_trained_length_warns_once_per_stream() -> None:
    said: list[str] = []
    run = Session(NumpyEngine(CONFIG), trained_positions=10, warn=said.append)
    run.feed(tokens(10))
    assert said == []
    list(run.generate(5))
    assert len(said) == 1
    assert "10 positions" in said[0]
    run.reset()
    run.feed(tokens(30))
    assert len(said) == 2


def test_statistics_count_what_happened() -> None:
    run = session()
    before = run.statistics()
    assert (before.ttft_s, before.prefill_tokens_per_s, before.decode_tokens_per_s) == (None, None, None)
    run.feed(tokens(30))
    list(run.generate(10))
    found = run.statistics()
    assert (found.prompt_tokens, found.new_tokens, found.position) == (30, 10, 39)
    assert found.events == (39 - 14) // 6 + 1
    assert found.live_entries == 8 + (39 - 14) % 6
    assert found.max_entries == 14
    # 14 slots and 8 positions per head, 2 x 4 floats and a log-beta each.
    assert found.cache_bytes == 2 * 2 * (14 * (2 * 4 * 4 + 4) + 8 * 8)
    assert found.peak_rss_bytes >= found.rss_bytes > 10**6
    for value in (found.ttft_s, found.prefill_tokens_per_s, found.decode_tokens_per_s, found.event_s):
        assert value is not None
        assert value > 0
    assert found.as_dict()["events"] == found.events
    assert any("30 tokens" in line for line in found.lines())


def test_a_loaded_state_with_a_full_ring_is_evicted_first() -> None:
    full = NumpyEngine(CONFIG)
    for token in tokens(14):
        full.decode(token)
    run = session()
    run.engine.load_state(full.state())
    run.feed(tokens(3, 1))
    assert_same(run.engine, one_by_one([*tokens(14), *tokens(3, 1)]))  # type: ignore[arg-type]
