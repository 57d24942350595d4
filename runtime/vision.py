"""Pictures and videos from files, on their way into a stream: measured at once, encoded when the stream gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.pictures import IMAGE, VIDEO
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.picture import PictureLimits, read_picture
from trimkv_edge.runtime.picture_header import PictureError
from trimkv_edge.runtime.picture_patches import PatchSettings, PicturePatches, choose_bucket, cut
from trimkv_edge.runtime.vision_frames import FPS, MOST_FRAMES, open_video

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Shown:
    """An image or a video that a message shows.

    Attributes:
        kind: ``image`` or ``video``.
        rows: tokens of the stream that it takes; of a video, each of its frame groups.
        seconds: of each frame group of a video; empty for an image.
        patches: gives them, of an image once, of a video one frame group after the other.
    """

    kind: str
    rows: int
    seconds: tuple[float, ...]
    patches: Callable[[], Iterator[PicturePatches]]

    @property
    def groups(self) -> int:
        """Pictures that the engine reads."""
        return len(self.seconds) or 1


class PictureReader:
    """Reads files for one model.

    Args:
        vision: of its manifest.
        limits: of each picture; None: the defaults.
    """

    def __init__(self, vision: VisionInfo, limits: PictureLimits | None = None) -> None:
        self._vision, self._limits = vision, limits
        self._settings = PatchSettings.of(vision)

    @classmethod
    def of(cls, artefact: Artefact, limits: PictureLimits | None = None) -> PictureReader:
        """Raises :class:`ConfigError` if the artefact's model reads text only."""
        if artefact.manifest.vision is None:
            raise ConfigError(
                f"{artefact.folder} is of a text model, which reads no pictures: leave them out, or export a model of "
                "family qwen3_vl"
            )
        return cls(artefact.manifest.vision, limits)

    def image(self, source: Path | bytes, name: str = "") -> Shown:
        """Decodes a picture, and keeps its patches only.

        Args:
            source: a file, or what it holds.
            name: for messages.

        Raises:
            PictureError: see :func:`~trimkv_edge.runtime.picture.read_picture`; also one that is too narrow.
            TrimKVError: Pillow is not installed.
        """
        name = name or (str(source) if isinstance(source, Path) else "the picture")
        image = read_picture(source, self._limits, name).image
        patches = cut(image, self._settings, [self._size(image.height, image.width, name)])
        return Shown(IMAGE, self._rows(patches), (), lambda: iter([patches]))

    def video(self, path: Path, fps: float = FPS, most: int = MOST_FRAMES) -> Shown:
        """Checks a video, whose frames are decoded again when the stream gets there; arguments and errors as of
        :func:`~trimkv_edge.runtime.vision_frames.open_video`."""
        video, together = open_video(path, fps, most, self._limits), self._vision.temporal_patch_size
        size = self._size(video.height, video.width, str(path))
        # The last frame stands for those that its group lacks.
        groups = [video.seconds[start : start + together] for start in range(0, len(video.seconds), together)]

        def patches() -> Iterator[PicturePatches]:
            frames = video.frames()
            while group := list(islice(frames, together)):
                yield self._group(group + group[-1:] * (together - len(group)), size)

        down, across = self._vision.rows(size)
        return Shown(VIDEO, down * across, tuple((group[0] + group[-1]) / 2 for group in groups), patches)

    def _size(self, height: int, width: int, name: str) -> tuple[int, int]:
        try:
            return choose_bucket(height, width, self._vision.sizes, self._settings)
        except PictureError as error:
            raise PictureError(f"{name if name.isprintable() else ascii(name)}: {error}") from error

    def _rows(self, patches: PicturePatches) -> int:
        return int(patches.grid_thw.prod()) // self._vision.merge_size**2

    def _group(self, frames: list[Image], size: tuple[int, int]) -> PicturePatches:
        cuts = [cut(frame, self._settings, [size]) for frame in frames]
        shape = (size[0] * size[1], 3, len(frames), self._vision.patch_size**2)
        values = np.empty(shape, np.float32)
        for index, one in enumerate(cuts):
            # A picture stands in all frames of its patches.
            values[:, :, index] = one.pixel_values.reshape(shape)[:, :, 0]
        return PicturePatches(values.reshape(shape[0], -1), cuts[0].grid_thw)
