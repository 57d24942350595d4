"""How likely tokens were: what requests call ``logprobs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trimkv_edge.engine import FloatArray


class TokenScore(NamedTuple):
    """A token's text, its natural log-probability, and the most likely tokens at its place with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


def score(logits: FloatArray, token: int, count: int, text_of: Callable[[int], str]) -> TokenScore:
    """What the model itself thought of ``token``: before penalties, temperature, filters and schemas.

    Args:
        logits: ``[vocab_size]`` from which it was drawn.
        token: its id.
        count: how many of the most likely tokens to name, the lower id first where two are equal.
        text_of: text of an id.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:count]
    return TokenScore(
        text_of(token), float(scores[token]), tuple((text_of(int(other)), float(scores[other])) for other in best)
    )
