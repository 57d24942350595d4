"""What engines of exported artefacts have in common whose model reads pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, ModelError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.pictures import IMAGE, VIDEO, Picture
from trimkv_edge.runtime.engines.base import ArtefactEngine

# Each loaded size of a vision encoder has weights of its own: so many bytes of them stay loaded, or one size.
KEPT_ENCODERS = 256 * 2**20


class MixedArtefactEngine(MixedEngine, ArtefactEngine):
    """Takes placeholders and picture sizes from the manifest; goes before the engine's own kind."""

    @property
    def vision(self) -> VisionInfo:
        """Of the manifest; raises :class:`ArtefactError` if it says nothing of pictures."""
        if self._manifest.vision is None:
            raise ArtefactError(f"{self._folder} is of a text model: it has no vision encoder")
        return self._manifest.vision

    @property
    def placeholders(self) -> Mapping[int, str]:
        return {self.vision.image_token_id: IMAGE, self.vision.video_token_id: VIDEO}

    @property
    def picture_shape(self) -> tuple[int, int]:
        return self.vision.features, self._manifest.model.hidden_size

    def encode(self, kind: str, pixel_values: FloatArray, grid_thw: IntArray) -> list[Picture]:
        """See :class:`MixedEngine`; only sizes that the encoder was exported for are taken."""
        grids = self._checked_grids(kind, pixel_values, grid_thw)
        pictures, done = [], 0
        for frames, down, across in grids:
            for _ in range(frames):
                pixels = np.ascontiguousarray(pixel_values[done : done + down * across], np.float32)
                done += down * across
                rows, features = self._encode((down, across), pixels)
                pictures.append(Picture(kind, *self.vision.rows((down, across)), rows, features))
        return pictures

    def _checked_grids(self, kind: str, pixel_values: FloatArray, grid_thw: IntArray) -> Any:
        grid = np.asarray(grid_thw)
        if grid.ndim != 2 or grid.shape[1:] != (3,) or grid.dtype.kind not in "iu" or not grid.size or grid.min() < 1:
            raise ModelError(f"{kind} grid {grid.tolist()}: give positive whole numbers [pictures, 3]")
        if kind == IMAGE and (grid[:, 0] != 1).any():
            raise ModelError(f"image grid {grid.tolist()}: an image has 1 frame group; give more of them as a video")
        for size in map(tuple, grid[:, 1:].tolist()):
            if size not in self.vision.sizes:
                known = ", ".join(f"{down} x {across}" for down, across in self.vision.sizes)
                raise ModelError(
                    f"a picture of {size[0]} x {size[1]} patches: this artefact was exported for {known}; resize it, "
                    "or export again with --image-sizes"
                )
        want = (int(grid.prod(-1).sum()), self.vision.patch_values)
        if np.shape(pixel_values) != want:
            raise ModelError(
                f"{kind} pixels {list(np.shape(pixel_values))}: grid {grid.tolist()} needs {list(want)}, "
                "from RGB pictures"
            )
        return grid.tolist()

    @abstractmethod
    def _encode(self, size: tuple[int, int], pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """``[patches, values]`` of one picture -> rows ``[rows, hidden_size]`` and DeepStack features
        ``[features, rows, hidden_size]``, in memory of their own."""
