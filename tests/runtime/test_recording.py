"""Lifetimes recorded from sessions, against the survivors of an engine that is driven token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from executorch_pooled_artefact import pooled_artefact
from factories import gated_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_engine import VOCAB, NumpyEngine
from onnx_artefact import make_artefact, make_manifest, spread_gates
from vision_text_artefact import IMAGE_PLACE, VIDEO_PLACE, noise, png, vision_text_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.errors import ConfigError, PositionLimitError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine
from trimkv_edge.runtime.lifetimes import LEFT_NEVER
from trimkv_edge.runtime.recording import Recording, record
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader
from trimkv_edge.runtime.vision_text import PictureText

CONFIG = CacheConfig(budget=8, buffer=6, prefill_chunk=4)
Held = dict[int, list[set[int]]]


def by_hand(engine: Engine, tokens: Sequence[int]) -> tuple[Held, list[int]]:
    """For each stream length what each head holds, row after row, and where events were."""
    held: Held = {}
    events = []
    for token in tokens:
        engine.decode(token)
        if engine.room == 0:
            engine.evict()
            events.append(engine.seen)
        rows = engine.survivors().reshape(engine.num_layers * engine.num_kv_heads, -1)
        held[engine.seen] = [{position for position in row.tolist() if position >= 0} for row in rows]
    return held, events


def assert_holds(recording: Recording, held: Held, events: list[int]) -> None:
    lifetimes = recording.lifetimes
    assert lifetimes.events.tolist() == events
    rows = lifetimes.left.reshape(-1, lifetimes.tokens)
    for seen, want in held.items():
        got = [{position for position in range(seen) if row[position] > seen} for row in rows]
        assert got == want, f"after {seen} tokens"
    assert set(np.unique(rows)) <= {*events, LEFT_NEVER}


@given(
    budget=st.integers(1, 12),
    buffer=st.integers(1, 9),
    chunk=st.integers(1, 9),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=70),
    new=st.integers(0, 12),
)
@settings(max_examples=50, deadline=None)
def test_what_is_held_is_what_survived_at_every_moment(
    budget: int, buffer: int, chunk: int, tokens: list[int], new: int
) -> None:
    chunk = min(budget, buffer, chunk)
    config = CacheConfig(budget=budget, buffer=buffer, prefill_chunk=chunk)
    recording = record(Session(NumpyEngine(config)), tokens, new)
    session = Session(NumpyEngine(config), note_tokens=True)
    session.feed(tokens)
    pieces = [piece.token for piece in session.generate(new)]
    assert recording.tokens == [*tokens, *pieces]
    assert recording.prompt_tokens == len(tokens)
    assert_holds(recording, *by_hand(NumpyEngine(config), recording.tokens))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(5).integers(3, VOCAB, 90).tolist()


def test_onnx_with_a_budget_for_each_head(tmp_path: Path, tokens: list[int]) -> None:
    made = make_artefact(tmp_path, spread_gates(gated_model("llama-gqa")), CacheConfig(24, 8, 8))
    recording = record(Session(made.onnx()), tokens, 20)
    held, events = by_hand(made.eager(), recording.tokens)
    assert_holds(recording, held, events)
    assert len(events) == (110 - 32) // 8 + 1
    assert len({frozenset(row) for row in held[110]}) > 1, "the heads do not differ"


def test_onnx_with_a_shared_budget(tmp_path: Path, tokens: list[int]) -> None:
    config = CacheConfig(22, 8, 8, "global", caps=((48, 16), (40, 24)))
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    target = export_onnx(model, config, tmp_path)
    engine = OnnxPooledEngine(tmp_path, make_manifest(model, config, target), target, threads=1)
    recording = record(Session(engine), tokens, 20)
    held, events = by_hand(eager_engine(model, config), recording.tokens)
    assert_holds(recording, held, events)
    assert len({len(row) for row in held[110]}) > 1, "the heads hold equally many"


def test_executorch_with_a_shared_budget(tokens: list[int]) -> None:
    made = pooled_artefact("xnnpack")
    recording = record(Session(made.engine()), tokens, 20)
    held, events = by_hand(made.eager(), recording.tokens)
    assert_holds(recording, held, events)
    assert [chunk.entries for chunk in recording.chunks] == [
        sum(map(len, held[chunk.seen])) for chunk in recording.chunks
    ]


def test_pictures_are_rows_of_the_stream(tmp_path: Path) -> None:
    artefact = Artefact.load(vision_text_artefact())
    vision, tokenizer = artefact.manifest.vision, artefact.tokenizer
    assert vision is not None
    assert tokenizer is not None
    for number in range(4):
        noise(number).save(tmp_path / f"{number}.png")
    reader = PictureReader(vision)
    shown = [reader.image(png(noise(8))), reader.video(tmp_path), reader.image(png(noise(9, 16, 16)))]
    text = f"the cat {IMAGE_PLACE} sat on {VIDEO_PLACE} the mat {IMAGE_PLACE} and the dog sat on the log"
    reading = PictureText(tokenizer, vision).encode(text, shown)
    recording = record(Session.open(artefact), reading, 20, vision=vision)
    assert recording.tokens[: len(reading.tokens)] == reading.tokens
    assert recording.prompt_tokens == len(reading.tokens)

    # Another engine gets all pictures at once and goes token by token.
    engine = Session.open(artefact).engine
    assert isinstance(engine, MixedEngine)
    for one in reading.shown:
        for made in one.patches():
            engine.show(engine.encode(one.kind, made.pixel_values, made.grid_thw))
    held, events = by_hand(engine, recording.tokens)
    assert_holds(recording, held, events)
    assert len(events) >= 4

    placeholders = {vision.image_token_id: "image", vision.video_token_id: "video"}
    rows = [
        position for picture in recording.pictures for position in range(picture.start, picture.start + picture.rows)
    ]
    assert rows == [position for position, token in enumerate(recording.tokens) if token in placeholders]
    for picture in recording.pictures:
        assert placeholders[recording.tokens[picture.start]] == picture.kind
        assert recording.tokens[picture.start - 1] == vision.start_token_id
    told = [(picture.label, picture.down, picture.across) for picture in recording.pictures]
    assert told == [("image 1", 2, 3), ("video 1, 0.2 s", 2, 3), ("video 1, 1.2 s", 2, 3), ("image 2", 2, 2)]

    with pytest.raises(ConfigError, match="give vision"):
        record(Session.open(artefact), reading)


def test_rows_that_are_filled_up_hold_nothing_there(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    session = Session(NumpyEngine(CONFIG))
    kept = np.array([[[0, 1, 2], [5, -1, -1]], [[-1, -1, -1], [12, 13, -1]]])
    monkeypatch.setattr(session.engine, "survivors", lambda: kept)
    # The stream ends with the event, so that its last token may have left too.
    lifetimes = record(session, tokens[:14]).lifetimes
    assert lifetimes.events.tolist() == [14]
    held = [np.flatnonzero(row == LEFT_NEVER).tolist() for row in lifetimes.left.reshape(4, 14)]
    assert held == [[0, 1, 2], [5], [], [12, 13]]


def test_some_heads_are_rows_of_all(tokens: list[int]) -> None:
    every = record(Session(NumpyEngine(CONFIG)), tokens).lifetimes
    one = record(Session(NumpyEngine(CONFIG)), tokens, heads=[1]).lifetimes
    assert (every.heads, one.heads) == ((0, 1), (1,))
    np.testing.assert_array_equal(one.left, every.left[:, [1]])


def test_chunks_say_what_each_call_did(tokens: list[int]) -> None:
    told: list[tuple[int, int]] = []
    recording = record(Session(NumpyEngine(CONFIG)), tokens, 5, progress=lambda *at: told.append(at))
    seen = [chunk.seen for chunk in recording.chunks]
    # Chunks of 4 that end at events, which come after 14 tokens and every 6 from then on; then token by token.
    assert seen == [4, 8, 12, 14, *(at + step for at in range(14, 86, 6) for step in (4, 6)), 90, 91, 92, 93, 94, 95]
    assert told == [(at, 95) for at in seen]
    assert [chunk.entries for chunk in recording.chunks[:6]] == [16, 32, 48, 32, 48, 32]
    assert all(chunk.seconds > 0 and chunk.rss > 2**20 for chunk in recording.chunks)


def test_generation_stops_and_draws_like_the_session(tokens: list[int]) -> None:
    drawing = SamplingParams(temperature=1.5, seed=3)
    session = Session(NumpyEngine(CONFIG))
    session.feed(tokens)
    want = [piece.token for piece in session.generate(12, drawing)]
    recording = record(Session(NumpyEngine(CONFIG)), tokens, 12, sampling=drawing)
    assert recording.tokens == [*tokens, *want]
    # The token that ends a text is not read.
    stopped = record(Session(NumpyEngine(CONFIG)), tokens, 12, sampling=drawing, stop_ids=[want[4]])
    assert stopped.tokens == [*tokens, *want[: want.index(want[4])]]


def test_what_cannot_be_recorded_is_refused(tokens: list[int]) -> None:
    used = Session(NumpyEngine(CONFIG))
    used.feed(tokens)
    with pytest.raises(ConfigError, match="read 90 tokens already"):
        record(used, tokens)
    for heads in ([], [2], [-1], [0, 0]):
        with pytest.raises(ConfigError, match="distinct and from 0 to 1"):
            record(Session(NumpyEngine(CONFIG)), tokens, heads=heads)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        record(Session(NumpyEngine(CONFIG)), [])
    limited = Session(NumpyEngine(CONFIG, position_limit=50))
    with pytest.raises(PositionLimitError):
        record(limited, tokens)
    assert limited.engine.seen == 0
