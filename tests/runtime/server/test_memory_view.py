"""The view of a session against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from text_artefact import CONFIG, text_artefact

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
    want = [
        [position, artefact.tokenizer.decode([tokens[position]]), round(counts[position] / (layers * heads), 4)]
        for position in sorted(counts)
    ]
    assert view["tokens"] == want[-10:]
    assert view["older"] == len(want) - 10 > 0
    assert (view["position"], view["max_entries"]) == (len(tokens), CONFIG.budget + CONFIG.buffer)
    assert view["cache_bytes"] == artefact.manifest.bytes.cache
    assert np.isfinite(view["rss_bytes"])


def test_a_session_without_notes_has_no_view() -> None:
    session = Session.open(Artefact.load(text_artefact()), "onnx", 1)
    with pytest.raises(ConfigError, match="note_tokens=True"):
        memory_view(session)
