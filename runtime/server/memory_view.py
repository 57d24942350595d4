"""What a session's cache holds now, for people to look at."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from trimkv_edge.runtime.kept import Held, held_tokens
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.tokenizer import TextTokenizer

NEWEST = 400


def memory_view(session: Session, newest: int = NEWEST) -> dict[str, Any]:
    """JSON of a session that notes its tokens.

    ``tokens``: ``[position, text, share of the KV heads that hold it]`` of the ``newest`` tokens held; ``older``: held
    tokens before those; special tokens are written as in templates. ``entries`` and ``mean_age`` (in tokens):
    ``[layers][kv_heads]``. ``look_s``: seconds that this look took from the session.

    Raises:
        ConfigError: the session notes no tokens.
    """
    began, engine, facts = perf_counter(), session.engine, session.statistics()
    positions = engine.survivors()
    live = positions >= 0
    entries = live.sum(-1)
    ages = np.where(live, engine.seen - positions, 0).sum(-1) / np.maximum(entries, 1)
    # Only the newest become text: decoding all that a large cache holds would stop the answer for longer.
    held = held_tokens(session, newest)
    ever = np.zeros(engine.seen, dtype=bool)
    ever[positions[live]] = True
    view = {
        "position": facts.position,
        "position_limit": engine.position_limit,
        "live_entries": facts.live_entries,
        "max_entries": facts.max_entries,
        "cache_bytes": facts.cache_bytes,
        "rss_bytes": facts.rss_bytes,
        "events": facts.events,
        "prefill_tokens_per_s": facts.prefill_tokens_per_s,
        "decode_tokens_per_s": facts.decode_tokens_per_s,
        "entries": entries.tolist(),
        "mean_age": [[round(float(age), 1) for age in row] for row in ages],
        "older": int(ever.sum()) - len(held),
        "tokens": [[token.position, _written(session, token), round(token.share, 4)] for token in held],
    }
    return {**view, "look_s": perf_counter() - began}


def _written(session: Session, token: Held) -> str:
    tokens, tokenizer = session.tokens, session.tokenizer
    if token.text or tokens is None or not isinstance(tokenizer, TextTokenizer):
        return token.text
    return tokenizer.token(int(tokens[token.position]))
