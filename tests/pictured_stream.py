"""A made-up stream with an image and a video whose survivors are known, shared by tests."""

from __future__ import annotations

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from trimkv_edge.runtime.lifetimes import LEFT_NEVER, Lifetimes
from trimkv_edge.runtime.recording import Chunk, Recording
from trimkv_edge.runtime.seen_pictures import SeenPicture

TOKENS, LAYERS, HEADS = 40, 2, 2
EVENTS = (12, 20, 28, 36)
KEPT = 8
# Where rows are: an image of 2 x 3, and two frame groups of 2 x 2.
PLACES = {"image": range(2, 8), "first": range(14, 18), "second": range(22, 26)}


class Pictured(NamedTuple):
    """The stream, and what each head holds after each event: ``held[event][layer, head]``."""

    recording: Recording
    held: list[dict[tuple[int, int], set[int]]]

    def holders(self, seen: int, position: int, heads: list[tuple[int, int]] | None = None) -> int:
        """Heads that hold a token, counted from the survivors; -1: it was not read yet."""
        if position >= seen:
            return -1
        event = sum(at <= seen for at in EVENTS) - 1
        chosen = heads or [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
        fresh = event < 0 or position >= EVENTS[event]
        return sum(fresh or position in self.held[event][where] for where in chosen)


def png(width: int, height: int, seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@cache
def pictured() -> Pictured:
    """Each head keeps eight tokens at each event, drawn from what it held and what came since."""
    random, held = np.random.default_rng(7), []
    left = np.full((LAYERS, HEADS, TOKENS), LEFT_NEVER, np.int32)
    now: dict[tuple[int, int], set[int]] = {(layer, head): set() for layer in range(LAYERS) for head in range(HEADS)}
    for event, seen in enumerate(EVENTS):
        for where, before in now.items():
            there = sorted(before | set(range(EVENTS[event - 1] if event else 0, seen)))
            now[where] = set(random.choice(there, KEPT, replace=False).tolist())
            for position in set(there) - now[where]:
                left[where][position] = seen
        held.append(dict(now))
    pictures = (
        SeenPicture("image", 1, None, 2, 2, 3, 16, png(48, 32, 1)),
        SeenPicture("video", 1, 0.2, 14, 2, 2, 16, png(32, 32, 2)),
        SeenPicture("video", 1, 1.2, 22, 2, 2, 16, png(32, 32, 3)),
    )
    chunks = [Chunk(seen, 0.01, 2**26, 50) for seen in (*EVENTS, TOKENS)]
    lifetimes = Lifetimes(left, np.array(EVENTS), tuple(range(HEADS)))
    return Pictured(Recording(lifetimes, [5] * TOKENS, TOKENS, chunks, pictures), held)
