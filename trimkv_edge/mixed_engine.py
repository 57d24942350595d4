"""What engines do that read text, images and video frames from one stream into one bounded cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimkv_edge.engine import CacheState, Cursor, Engine, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.mixed_stream import place
from trimkv_edge.pictures import ChunkRows, Picture


class MixedEngine(Engine):
    """Reads tokens as every engine does; each placeholder among them takes the next row of the pictures shown.

    A picture may be cut between chunks at any row, so the bound holds while it is read. Its rows are freed after its
    last one. It goes before the engine's own kind in the list of bases.

    Attributes:
        waiting: pictures shown and not read to their end.
        cursor: where the stream stands.
    """

    cursor: Cursor

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._start()
        super().__init__(*args, **settings)

    def _start(self) -> None:
        self.waiting: list[Picture] = []
        self.cursor = Cursor()

    @property
    @abstractmethod
    def placeholders(self) -> Mapping[int, str]:
        """Kind of picture by the token id that holds its place."""

    @property
    @abstractmethod
    def picture_shape(self) -> tuple[int, int]:
        """DeepStack features of a picture, and the width of its rows."""

    @abstractmethod
    def encode(self, kind: str, pixel_values: FloatArray, grid_thw: IntArray) -> list[Picture]:
        """Runs the vision encoder.

        Args:
            kind: ``image`` or ``video``.
            pixel_values: float32 ``[patches, values]`` of all pictures.
            grid_thw: int64 ``[pictures, 3]``: frame groups (of images 1), patches down, patches across.

        Returns:
            one picture for each image, or for each frame group of each video, in order.

        Raises:
            ModelError: sizes that do not fit each other or the model.
        """

    @abstractmethod
    def _forward_rows(self, ids: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        """As ``_forward`` of other engines, with what the chunk has beside its ids."""

    def show(self, pictures: Sequence[Picture]) -> None:
        """Queues pictures, in the order of their placeholders.

        Raises:
            StateError: rows of another model.
        """
        want = self.picture_shape
        for picture in pictures:
            found = (picture.deepstack.shape[0], picture.embeddings.shape[1])
            if found != want:
                raise StateError(
                    f"a picture with {found[0]} DeepStack features of width {found[1]}, but this model has {want[0]} "
                    f"of width {want[1]}: encode it with this model"
                )
        self.waiting.extend(pictures)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        placed = place(ids, self.cursor, self.waiting, self.placeholders)
        logits = self._forward_rows(ids, placed.rows, live)
        self.cursor = placed.cursor
        del self.waiting[: placed.finished]
        return logits

    def _reset(self) -> None:
        super()._reset()  # type: ignore[safe-super]  # of the engine's own kind
        self._start()

    def load_state(self, state: CacheState) -> None:
        """As for every engine. Pictures that wait are forgotten, unless the stream stands where it stood.

        Raises:
            StateError: also a state that ends inside a picture, whose rows it does not hold.
        """
        cursor = state.cursor or Cursor(state.seen)
        same = (cursor, state.seen) == (self.cursor, self.seen)
        if cursor.row and not same:
            raise StateError(
                f"the state ends inside a picture, after {cursor.row} of its rows, and does not hold the others: "
                "read the stream again, or save states between pictures"
            )
        super().load_state(state)
        if not same:
            self.waiting = []
        self.cursor = cursor


def spread(rows: ChunkRows, embeddings: FloatArray, deepstack: FloatArray) -> None:
    """Puts a chunk's picture rows where its placeholders are.

    Args:
        embeddings: ``[T, hidden_size]`` of the chunk's ids, changed in place.
        deepstack: ``[features, T, hidden_size]``, overwritten: zeros where the chunk has text.
    """
    deepstack.fill(0)
    if rows.visual.any():
        where = np.flatnonzero(rows.visual)
        embeddings[where] = rows.embeddings
        deepstack[:, where] = rows.deepstack
