"""A recorded stream of the numpy engine and its page, shared by tests."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy_engine import VOCAB, NumpyEngine
from text_tokenizers import byte_level

from trimkv_edge.config import CacheConfig
from trimkv_edge.runtime.lifetimes import LEFT_NEVER, Lifetimes
from trimkv_edge.runtime.recording import Chunk, Recording, record
from trimkv_edge.runtime.report.page import About, build_page
from trimkv_edge.runtime.report.text import TokenText
from trimkv_edge.runtime.session import Session

# What a page must not take for markup, for the end of its data, or for a direction of its text.
HOSTILE = (
    "</script><script>alert(1)</script><!-- \" ' & \\u003c $name \u202eright\u2028 \x00\x1b[31m über 🙂 \r\n\tlast\n"
)


class Recorded(NamedTuple):
    """A stream, the text of its tokens, and its page."""

    recording: Recording
    texts: list[TokenText]
    page: str


@cache
def recorded() -> Recorded:
    """Hostile text and some more, read with a small cache; ten tokens are generated."""
    from trimkv_edge.runtime.report.text import token_texts

    tokenizer = byte_level(VOCAB)
    tokens = [1, *tokenizer.encode(HOSTILE + "the cat sat on the mat and the dog sat on the log.\n" * 20).ids]
    config = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
    recording = record(Session(NumpyEngine(config)), tokens, 10)
    texts = token_texts(_Named(tokenizer), recording.tokens)  # type: ignore[arg-type]
    about = About('a "name" <b>&</b>', [("engine", "numpy"), ("policy", "</dd><i>x</i>")], 24, 2, ["a <note>"])
    return Recorded(recording, texts, build_page(recording, texts, about))


class _Named:
    """A tokenizer as an artefact has it."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))  # type: ignore[attr-defined]

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""  # type: ignore[attr-defined]


def random_recording(layers: int, heads: int, tokens: int, *, budget: int = 512, buffer: int = 128) -> Recording:
    """Of a large model: each event drops an entry with a chance of its head's own."""
    random = np.random.default_rng(0)
    events = np.arange(budget + buffer, tokens + 1, buffer)
    first = np.searchsorted(events, np.arange(tokens), side="right")
    chance = 0.1 + 0.5 * random.random((layers, heads, 1))
    leaves = np.minimum(first + random.geometric(chance, (layers, heads, tokens)) - 1, events.size)
    left = np.append(events, LEFT_NEVER).astype(np.int32)[leaves]
    chunks = [Chunk(int(seen), 0.01, 2**30, budget * layers * heads) for seen in range(buffer, tokens + 1, buffer)]
    return Recording(Lifetimes(left, events, tuple(range(heads))), [5] * tokens, tokens, chunks)
