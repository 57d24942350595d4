"""Where the tokens of a mixed stream stand: pictures at their placeholders, and M-RoPE positions, chunk by chunk.

A picture's rows have positions of their own on three axes, from the corner that the text has reached; the text goes on
behind the longer side. The order of the stream, and with it every entry's age, is the plain count of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimkv_edge.engine import Cursor, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.pictures import ChunkRows, Picture


@dataclass(frozen=True)
class Placed:
    """A chunk that was placed: its rows, the cursor behind it, and how many pictures it read to their end."""

    rows: ChunkRows
    cursor: Cursor
    finished: int


def place(ids: IntArray, cursor: Cursor, pictures: Sequence[Picture], placeholders: Mapping[int, str]) -> Placed:
    """Places the next chunk of a stream; nothing is changed.

    Args:
        ids: token ids ``[T]``.
        cursor: before the chunk.
        pictures: those that wait, the present one first.
        placeholders: kind of picture by token id.

    Raises:
        StateError: placeholders and pictures do not fit each other.
    """
    kinds = [placeholders.get(token, "") for token in ids.tolist()]
    positions, shown, finished, start = [], [], 0, 0
    while start < len(kinds):
        kind = kinds[start]
        run = next((n for n, other in enumerate(kinds[start:]) if other != kind), len(kinds) - start)
        if cursor.row and kind != pictures[finished].kind:
            raise StateError(
                f"the {pictures[finished].kind} that is being read has {pictures[finished].rows} rows, but its "
                f"placeholders end after {cursor.row}: give one placeholder for each row"
            )
        if kind:
            picture = _present(kind, cursor, pictures[finished:])
            count = min(run, picture.rows - cursor.row)
            row = np.arange(cursor.row, cursor.row + count, dtype=np.int64)
            positions.append(np.stack([0 * row, row // picture.width, row % picture.width]) + cursor.position)
            shown.append((picture.embeddings[row], picture.deepstack[:, row]))
            cursor = replace(cursor, row=cursor.row + count)
            if cursor.row == picture.rows:
                cursor = Cursor(cursor.position + max(picture.height, picture.width), ended=kind)
                finished += 1
        else:
            count = run
            text = np.arange(cursor.position, cursor.position + count, dtype=np.int64)
            positions.append(np.broadcast_to(text, (3, count)))
            cursor = Cursor(cursor.position + count)
        start += count
    embeddings, deepstack = _joined(shown)
    rows = ChunkRows(np.concatenate(positions, 1), np.array([bool(kind) for kind in kinds]), embeddings, deepstack)
    return Placed(rows, cursor, finished)


def _present(kind: str, cursor: Cursor, pictures: Sequence[Picture]) -> Picture:
    """The picture that a placeholder stands for."""
    if cursor.ended == kind:
        raise StateError(
            f"more {kind} placeholders in a row than the {kind} before has rows: give one for each row, and a token "
            f"between two {kind}s"
        )
    if not pictures:
        raise StateError(f"a placeholder for {_a(kind)}, but none waits: show it to the engine first")
    if pictures[0].kind != kind:
        raise StateError(f"a placeholder for {_a(kind)}, but {_a(pictures[0].kind)} comes next: put them in one order")
    return pictures[0]


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _joined(shown: list[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    if not shown:
        return np.empty(0, np.float32), np.empty(0, np.float32)
    return np.concatenate([rows for rows, _ in shown]), np.concatenate([rows for _, rows in shown], 1)
