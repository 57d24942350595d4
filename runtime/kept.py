"""Which tokens of a stream are still held, and by how many heads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.session import Session


class Held(NamedTuple):
    """``text`` of one token at ``position``; ``share`` of all KV heads that hold it, above 0 to 1."""

    position: int
    text: str
    share: float


def held_tokens(session: Session, newest: int | None = None) -> list[Held]:
    """The tokens that at least one head holds, oldest first.

    Args:
        session: one that notes its tokens.
        newest: how many of them; None: all.

    Raises:
        ConfigError: the session notes no tokens, or has no tokenizer.
    """
    tokens, tokenizer = session.tokens, session.tokenizer
    if tokens is None or tokenizer is None:
        raise ConfigError("what is kept can be shown as text only by a session with a tokenizer and note_tokens=True")
    positions = session.engine.survivors()
    heads = positions.shape[0] * positions.shape[1]
    # Where heads share a budget, rows are filled up with -1.
    held, counts = np.unique(positions[positions >= 0], return_counts=True)
    chosen = slice(max(0, held.size - newest), None) if newest is not None else slice(None)
    return [
        Held(int(position), tokenizer.decode([int(tokens[position])]), float(count) / heads)
        for position, count in zip(held[chosen], counts[chosen], strict=True)
    ]
