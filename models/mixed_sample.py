"""Streams of text and pictures to try a model on: tokens with placeholders, and the pictures' pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.pictures import IMAGE, VIDEO

# Kind, pixels float32 [patches, values] and grid int64 [1, 3] of an image or a frame group.
Pixels = tuple[str, FloatArray, IntArray]


@dataclass(frozen=True)
class MixedSample:
    """One stream; ``pictures`` are in the order of their placeholders among ``tokens``."""

    tokens: list[int]
    pictures: list[Pixels]

    def show(self, engine: Engine) -> None:
        """Encodes the pictures with the engine's own encoder, and queues them."""
        if isinstance(engine, MixedEngine):
            for kind, pixels, grid in self.pictures:
                engine.show(engine.encode(kind, pixels, grid))


def mixed_sample(tokens: Sequence[int], vision: VisionInfo, seed: int = 0) -> MixedSample:
    """Text with noise for pictures of all sizes in it: an image, text of the same length, a frame of a video, ...

    Args:
        tokens: the text; as many come back, pictures' rows standing for some of them.
        vision: placeholders and sizes.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    special = {vision.image_token_id, vision.video_token_id, vision.start_token_id, vision.end_token_id}
    plain = next(token for token in range(len(special) + 1) if token not in special)
    out = [plain if token in special else token for token in tokens]
    pictures: list[Pixels] = []
    start = 3
    while True:
        size = vision.sizes[len(pictures) % len(vision.sizes)]
        kind = VIDEO if len(pictures) % 4 == 3 else IMAGE
        down, across = vision.rows(size)
        rows = down * across
        if start + rows + 2 >= len(out):
            return MixedSample(out, pictures)
        placeholder = vision.image_token_id if kind == IMAGE else vision.video_token_id
        out[start : start + rows + 2] = [vision.start_token_id, *[placeholder] * rows, vision.end_token_id]
        pixels = rng.standard_normal((size[0] * size[1], vision.patch_values), np.float32).clip(-1, 1)
        pictures.append((kind, pixels, np.array([[1, *size]], np.int64)))
        start += 2 * rows + 5
