"""Which words are held, against the survivors of a session counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_engine import VOCAB, NumpyEngine
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.kept import held_tokens
from trimkv_edge.runtime.session import Session

CONFIG = CacheConfig(budget=8, buffer=6, prefill_chunk=4)


def test_shares_are_heads_that_hold_a_token() -> None:
    tokenizer = byte_level(VOCAB)
    session = Session(NumpyEngine(CONFIG), tokenizer, note_tokens=True)
    stream = tokenizer.encode("the cat sat on the mat and the dog sat on the log " * 4).ids
    session.feed(stream)
    rows = session.engine.survivors().reshape(-1, session.engine.live).tolist()
    want = {}
    for position, token in enumerate(stream):
        holders = sum(position in row for row in rows)
        if holders:
            want[position] = (tokenizer.decode([token]), holders / 4)
    held = held_tokens(session)
    assert {token.position: (token.text, token.share) for token in held} == want
    assert [token.position for token in held] == sorted(want)
    assert len(want) > session.engine.live, "the heads do not differ"
    assert held_tokens(session, 3) == held[-3:]


def test_rows_that_are_filled_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(NumpyEngine(CONFIG), byte_level(VOCAB), note_tokens=True)
    session.feed([5, 6, 7])
    pooled = np.array([[[0, 2, -1], [1, -1, -1]], [[0, -1, -1], [2, -1, -1]]])
    monkeypatch.setattr(session.engine, "survivors", lambda: pooled)
    assert [(token.position, token.share) for token in held_tokens(session)] == [(0, 0.5), (1, 0.25), (2, 0.5)]


def test_without_notes_there_is_nothing_to_show() -> None:
    session = Session(NumpyEngine(CONFIG), byte_level(VOCAB))
    session.feed([5])
    with pytest.raises(ConfigError, match="note_tokens=True"):
        held_tokens(session)
