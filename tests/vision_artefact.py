"""Exports a small random model that reads pictures, beside the eager one; shared by tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from factories import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START
from onnx_artefact import make_manifest
from vision_streams import Mixed

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.manifest import Manifest, Target, VisionInfo
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.vision_engine import VisionEngine, vision_engine

SIZES = ((4, 4), (4, 6), (6, 4))
HALF = (0.5, 0.5, 0.5)


@dataclass
class VisionArtefact:
    """An exported model beside the eager one it was made from."""

    folder: Path
    model: GatedVisionModel
    manifest: Manifest
    target: Target

    def eager(self) -> VisionEngine:
        return vision_engine(self.model, self.manifest.cache)


def vision_manifest(model: GatedVisionModel, config: CacheConfig, target: Target) -> Manifest:
    """As much of a manifest as an engine reads."""
    vision = model.base.config.vision_config
    info = VisionInfo(
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        start_token_id=VISION_START,
        end_token_id=VISION_END,
        features=len(vision.deepstack_visual_indexes),
        sizes=SIZES,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        mean=HALF,
        std=HALF,
    )
    return replace(make_manifest(model, config, target), vision=info)


def long_stream(seed: int = 0, pictures: int = 8) -> Mixed:
    """Text with pictures of all sizes between, the last thing being text."""
    rng, stream = np.random.default_rng(seed), Mixed(seed)
    for number in range(pictures):
        stream.text(int(rng.integers(1, 12)))
        size = SIZES[number % len(SIZES)]
        if number % 4 == 3:
            stream.video(2, *size)
        else:
            stream.image(*size)
    return stream.text(9)


@dataclass
class Read:
    """What an engine made of a stream: logits after each chunk, survivors after each event."""

    logits: list[FloatArray]
    survivors: list[IntArray]


def read(engine: MixedEngine, stream: Mixed, sizes: tuple[int, ...]) -> Read:
    """Encodes and reads a stream in chunks of the given lengths (repeated), with all events."""
    kinds = {"image": stream.image_grids, "video": stream.video_grids}
    for kind, number in stream.order:
        engine.show(engine.encode(kind, stream.pixels[kind][number].numpy(), np.array([kinds[kind][number]])))
    out, done, turn = Read([], []), 0, 0
    while done < len(stream.tokens):
        count = min(sizes[turn % len(sizes)], engine.room, len(stream.tokens) - done)
        out.logits.append(engine.prefill(stream.tokens[done : done + count]))
        done, turn = done + count, turn + 1
        if engine.room == 0:
            engine.evict()
            out.survivors.append(np.sort(engine.survivors(), -1))
    return out
