"""Pictures as rows of a stream (numpy only): what a vision encoder makes and a decoder reads at their placeholders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ModelError

IMAGE, VIDEO = "image", "video"


@dataclass(frozen=True)
class Picture:
    """What the decoder reads in place of the placeholders of one image, or of one frame group of a video.

    Attributes:
        kind: ``image`` or ``video``, which have placeholders of their own.
        height, width: in rows; a row is a square of merged patches.
        embeddings: float32 ``[height * width, hidden_size]``, line by line.
        deepstack: float32 ``[features, height * width, hidden_size]``; feature n is added after decoder layer n.

    Raises:
        ModelError: unknown kind, or sizes that do not fit each other.
    """

    kind: str
    height: int
    width: int
    embeddings: FloatArray
    deepstack: FloatArray

    def __post_init__(self) -> None:
        rows = self.height * self.width
        if self.kind not in (IMAGE, VIDEO) or min(self.height, self.width) < 1:
            raise ModelError(
                f"picture of kind {self.kind!r} with {self.height} x {self.width} rows: give {IMAGE!r} or {VIDEO!r} "
                "and at least one row"
            )
        if self.embeddings.shape[:-1] != (rows,) or self.deepstack.shape[1:] != self.embeddings.shape:
            raise ModelError(
                f"picture of {self.height} x {self.width} rows has embeddings {tuple(self.embeddings.shape)} and "
                f"DeepStack features {tuple(self.deepstack.shape)}, but needs {rows} rows in each"
            )

    @property
    def rows(self) -> int:
        """Tokens of the stream that it takes."""
        return self.height * self.width


class ChunkRows(NamedTuple):
    """What a chunk of a mixed stream has beside its token ids; T tokens, V of them picture rows.

    Attributes:
        positions: int64 ``[3, T]``, M-RoPE positions: time, height, width.
        visual: bool ``[T]``, which tokens are picture rows.
        embeddings: float32 ``[V, hidden_size]``.
        deepstack: float32 ``[features, V, hidden_size]``.
    """

    positions: IntArray
    visual: npt.NDArray[np.bool_]
    embeddings: FloatArray
    deepstack: FloatArray
