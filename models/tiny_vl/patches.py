"""Pictures of one size as the vision encoder reads them, many at once."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATCH, MERGE, FRAMES = 8, 2, 2
MIN_PIXELS, MAX_PIXELS = 32 * 32, 96 * 64


def cut_many(pixels: np.ndarray) -> tuple[Tensor, int, int]:
    """`uint8 [N, frames, height, width, 3]`, 1 or 2 frames -> float32 `[N, patches, values]`, patches down and across.

    The same values as `trimkv_edge.runtime.picture_patches.cut` gives for one picture.
    """
    count, frames, height, width, _ = pixels.shape
    down, across = height // PATCH, width // PATCH
    scaled = torch.from_numpy(pixels).float().mul_(1 / 255).sub_(0.5).div_(0.5)
    parts = scaled.view(count, frames, down // MERGE, MERGE, PATCH, across // MERGE, MERGE, PATCH, 3)
    parts = parts.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    if frames == 1:
        parts = parts.expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    return parts.reshape(count, down * across, -1), down, across


def save_settings(folder: Path) -> None:
    """Write how pictures are cut to `folder`, as transformers' image processor reads it."""
    fields = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
