"""The pictures of a stream as the vision encoder saw them, noted while they are read."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import numpy.typing as npt

from trimkv_edge.manifest import VisionInfo
from trimkv_edge.pictures import IMAGE, VIDEO
from trimkv_edge.runtime.picture_patches import PicturePatches
from trimkv_edge.runtime.vision import Shown
from trimkv_edge.runtime.vision_text import Reading

MOST_PIXELS = 2**22  # kept of all pictures of a stream together
_LONGEST_SIDE = 640


@dataclass(frozen=True)
class SeenPicture:
    """An image, or a frame group of a video, whose rows are tokens of a stream.

    Attributes:
        kind: ``image`` or ``video``.
        number: of the image among the images, or of the video among the videos, from 1.
        seconds: of a frame group, from the beginning of its video; None for an image.
        start: position of its first row in the stream.
        down, across: in rows, which follow each other line by line.
        side: of a row's square in pixels, as the encoder saw it.
        png: the picture, of a frame group its first frame; smaller where there are many pixels.
    """

    kind: str
    number: int
    seconds: float | None
    start: int
    down: int
    across: int
    side: int
    png: bytes = field(repr=False)

    @property
    def rows(self) -> int:
        """Tokens of the stream that it takes."""
        return self.down * self.across

    @property
    def label(self) -> str:
        """Its name for people."""
        when = "" if self.seconds is None else f", {self.seconds:.1f} s"
        return f"{self.kind} {self.number}{when}"

    def box(self, row: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a row's square in pixels, the last two not part of it."""
        line, column = divmod(row, self.across)
        return column * self.side, line * self.side, (column + 1) * self.side, (line + 1) * self.side


def noting(reading: Reading, vision: VisionInfo) -> tuple[Reading, list[SeenPicture]]:
    """The same reading, and a list that gets each picture when it is encoded.

    All pictures together keep at most 2^22 pixels, whatever their number.
    """
    seen: list[SeenPicture] = []
    longest = max(1, min(_LONGEST_SIDE, math.isqrt(MOST_PIXELS // max(1, len(reading.starts)))))
    numbers = {IMAGE: count(1), VIDEO: count(1)}
    starts = iter(reading.starts)

    def noted(shown: Shown) -> Shown:
        number, places = next(numbers[shown.kind]), [next(starts) for _ in range(shown.groups)]

        def patches() -> Iterator[PicturePatches]:
            for group, made in enumerate(shown.patches()):
                down, across = vision.rows((int(made.grid_thw[0, 1]), int(made.grid_thw[0, 2])))
                seconds = shown.seconds[group] if shown.seconds else None
                side, png = vision.patch_size * vision.merge_size, _png(joined(made, vision), longest)
                seen.append(SeenPicture(shown.kind, number, seconds, places[group], down, across, side, png))
                yield made

        return replace(shown, patches=patches)

    return replace(reading, shown=tuple(map(noted, reading.shown))), seen


def joined(patches: PicturePatches, vision: VisionInfo) -> npt.NDArray[np.uint8]:
    """RGB ``[height, width, 3]`` of the first frame that the patches were cut from."""
    _, down, across = patches.grid_thw[0].tolist()
    merge, patch = vision.merge_size, vision.patch_size
    values = patches.pixel_values.reshape(down * across, 3, vision.temporal_patch_size, patch * patch)[:, :, 0]
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (vision.mean, vision.std))
    pixels = ((values * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    parts = pixels.reshape(down // merge, across // merge, merge, merge, 3, patch, patch)
    return parts.transpose(0, 2, 5, 1, 3, 6, 4).reshape(down * patch, across * patch, 3)


def _png(pixels: npt.NDArray[np.uint8], longest: int) -> bytes:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((longest, longest))  # never larger
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
