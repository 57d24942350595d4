"""What a session's cache holds now, for people to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimkv_edge.runtime.kept import held_tokens
from trimkv_edge.runtime.session import Session

NEWEST = 400


def memory_view(session: Session, newest: int = NEWEST) -> dict[str, Any]:
    """JSON of a session that notes its tokens.

    ``tokens``: ``[position, text, share of the KV heads that hold it]`` of the ``newest`` tokens held; ``older``: held
    tokens before those. ``entries`` and ``mean_age`` (in tokens): ``[layers][kv_heads]``.

    Raises:
        ConfigError: the session notes no tokens.
    """
    engine, facts = session.engine, session.statistics()
    positions = engine.survivors()
    live = positions >= 0
    entries = live.sum(-1)
    ages = np.where(live, engine.seen - positions, 0).sum(-1) / np.maximum(entries, 1)
    held = held_tokens(session)
    return {
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
        "older": max(0, len(held) - newest),
        "tokens": [[token.position, token.text, round(token.share, 4)] for token in held[-newest:]],
    }
