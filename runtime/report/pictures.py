"""What pages, plots and numbers say about the pictures of a stream."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import IntArray
from trimkv_edge.pictures import IMAGE, VIDEO
from trimkv_edge.runtime.recording import Recording
from trimkv_edge.runtime.report.text import TokenText
from trimkv_edge.runtime.seen_pictures import SeenPicture

TEXT = "text"
KINDS = (TEXT, IMAGE, VIDEO)
_ROW = "▣"


def row_texts(texts: Sequence[TokenText], recording: Recording) -> list[TokenText]:
    """``texts`` of a stream with one sign for each row of a picture in place of its placeholder's name."""
    out = list(texts)
    for picture in recording.pictures:
        for position in range(picture.start, picture.start + picture.rows):
            out[position] = TokenText(_ROW, True)
    return out


def held_rows(recording: Recording, picture: SeenPicture, seen: int) -> IntArray:
    """``[down, across]``: recorded heads of all layers that hold each row at a stream length; -1: not read yet."""
    positions = np.arange(picture.start, picture.start + picture.rows)
    left = recording.lifetimes.left[..., picture.start : picture.start + picture.rows]
    counts = np.where(positions < seen, (left > seen).sum((0, 1), dtype=np.int64), -1)
    return counts.reshape(picture.down, picture.across)


def kinds_of(recording: Recording) -> npt.NDArray[np.uint8]:
    """``[tokens]``: index in ``KINDS`` of each token."""
    out = np.zeros(recording.lifetimes.tokens, np.uint8)
    for picture in recording.pictures:
        out[picture.start : picture.start + picture.rows] = KINDS.index(picture.kind)
    return out


def entries_by_kind(recording: Recording, seens: Sequence[int]) -> IntArray:
    """``[seens, 3]``: entries of text, images and videos that the recorded heads hold at stream lengths."""
    kinds, lifetimes = kinds_of(recording), recording.lifetimes
    counts = (np.bincount(kinds[:seen], lifetimes.holders(seen), len(KINDS)) for seen in seens)
    return np.array(list(counts)).reshape(-1, len(KINDS)).astype(np.int64)


def page_pictures(recording: Recording) -> list[dict[str, Any]]:
    """What the page's script draws of each."""
    return [
        {
            "kind": picture.kind,
            "label": picture.label,
            "start": picture.start,
            "down": picture.down,
            "across": picture.across,
            "side": picture.side,
            "png": base64.b64encode(picture.png).decode(),
        }
        for picture in recording.pictures
    ]


def numbers(recording: Recording) -> dict[str, Any]:
    """For a JSON file: where each picture is, at each event the rows that are held and by how many heads, and the
    entries of each kind; nothing for a stream without pictures."""
    if not recording.pictures:
        return {}
    events = recording.lifetimes.events.tolist()
    entries = entries_by_kind(recording, events)
    return {
        "pictures": [
            {
                "kind": picture.kind,
                "number": picture.number,
                "seconds": picture.seconds,
                "start": picture.start,
                "down": picture.down,
                "across": picture.across,
                "side": picture.side,
                "held": [_pairs(held_rows(recording, picture, seen)) for seen in events],
            }
            for picture in recording.pictures
        ],
        "entries": {kind: entries[:, index].tolist() for index, kind in enumerate(KINDS)},
    }


def _pairs(counts: IntArray) -> list[list[int]]:
    rows = np.flatnonzero(counts > 0)
    return [[int(row), int(count)] for row, count in zip(rows, counts.reshape(-1)[rows], strict=True)]
