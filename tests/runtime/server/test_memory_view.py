"""The view of a session against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_engine import VOCAB, NumpyEngine
from text_artefact import CONFIG, text_artefact
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.server.memory_view import memory_view
from trimkv_edge.runtime.session import Session


def test_what_is_held() -> None:
    artefact = Artefact.load(text_artefact())
    session = Session.open(artefact, "onnx", 1, note_tokens=True)
    assert artefact.tokenizer is not None
    empty = memory_view(session)
    assert (empty["position"], empty["tokens"], empty["live_entries"]) == (0, [], 0)
    tokens = artefact.tokenizer.encode("the cat sat on the mat and a dog on a log " * 4, add_special_tokens=False)
    session.feed(tokens)
    view = memory_view(session, newest=10)
    survivors = session.engine.survivors()
    layers, heads, live = survivors.shape
    counts: dict[int, int] = {}
    for layer in range(layers):
        for head in range(heads):
            held = [int(position) for position in survivors[layer, head]]
            assert view["entries"][layer][head] == len(held) == live
            mean = sum(len(tokens) - position for position in held) / len(held)
            assert view["mean_age"][layer][head] == pytest.approx(mean, abs=0.06)
            for position in held:
                counts[position] = counts.get(position, 0) + 1
    tokenizer = artefact.tokenizer
    want = [
        [position, tokenizer.decode([tokens[position]]), round(counts[position] / (layers * heads), 4)]
        for position in sorted(counts)
    ]
    assert view["tokens"] == want[-10:]
    assert view["older"] == len(want) - 10 > 0
    assert (view["position"], view["max_entries"]) == (len(tokens), CONFIG.budget + CONFIG.buffer)
    assert view["cache_bytes"] == artefact.manifest.bytes.cache
    assert np.isfinite(view["rss_bytes"])
    assert 0 < view["look_s"] < 5
    everything = memory_view(session, newest=10**6)
    assert (everything["tokens"], everything["older"]) == (want, 0)


def test_special_tokens_are_written_out() -> None:
    artefact = Artefact.load(text_artefact())
    session = Session.open(artefact, "onnx", 1, note_tokens=True)
    assert artefact.tokenizer is not None
    session.feed(artefact.tokenizer.encode("<s>a"))
    assert [text for _, text, _ in memory_view(session)["tokens"]] == ["<s>", "a"]


def test_rows_that_are_filled_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CacheConfig(budget=8, buffer=6, prefill_chunk=4)
    session = Session(NumpyEngine(config), byte_level(VOCAB), note_tokens=True)
    session.feed([5, 6, 7, 8])
    pooled = np.array([[[0, 2, -1], [1, -1, -1]], [[0, 3, 2], [-1, -1, -1]]])
    monkeypatch.setattr(session.engine, "survivors", lambda: pooled)
    view = memory_view(session, newest=3)
    assert view["entries"] == [[2, 1], [3, 0]]
    # 4 tokens were read, so position 0 is 4 old.
    assert view["mean_age"] == [[3.0, 3.0], [2.3, 0.0]]
    assert [(position, share) for position, _, share in view["tokens"]] == [(1, 0.25), (2, 0.5), (3, 0.25)]
    assert view["older"] == 1


def test_a_session_without_notes_has_no_view() -> None:
    session = Session.open(Artefact.load(text_artefact()), "onnx", 1)
    with pytest.raises(ConfigError, match="note_tokens=True"):
        memory_view(session)
