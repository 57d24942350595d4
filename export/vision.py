"""What an export settles for a model that reads pictures: their sizes, and how they are cut."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.source import ModelSource
from trimkv_edge.runtime.picture_patches import CONFIG_FILE, PatchSettings

# A picture of so many pixels is 256 rows of Qwen3-VL's.
_DEFAULT_PIXELS = 512 * 512
_RATIOS = (1.0, 2 / 3, 3 / 2)  # height to width
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def vision_info(source: ModelSource, sizes: Sequence[str]) -> VisionInfo:
    """How pictures enter a model's stream.

    Args:
        source: of a family that reads pictures; its folder's ``preprocessor_config.json`` says how pictures are cut,
            without one the configuration and Qwen3-VL's defaults do.
        sizes: ``WIDTHxHEIGHT`` in pixels; none: a square and two oblongs, of 512 x 512 pixels or as many as allowed.

    Raises:
        ConfigError: a size that is none, or that the encoder cannot cut evenly.
    """
    config: Any = source.config
    encoder = config.vision_config
    if source.folder is not None and (source.folder / CONFIG_FILE).is_file():
        settings = PatchSettings.load(source.folder)
        for name, found in (
            ("patch_size", settings.patch_size),
            ("spatial_merge_size", settings.merge_size),
            ("temporal_patch_size", settings.temporal_patch_size),
        ):
            if found != getattr(encoder, name):
                raise ConfigError(
                    f"{source.folder / CONFIG_FILE} cuts pictures with {name} {found}, but the encoder has "
                    f"{getattr(encoder, name)}: take the two files from one model"
                )
    else:
        settings = PatchSettings(encoder.patch_size, encoder.spatial_merge_size, encoder.temporal_patch_size)
    mean, std = settings.mean, settings.std
    return VisionInfo(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        start_token_id=config.vision_start_token_id,
        end_token_id=config.vision_end_token_id,
        features=len(encoder.deepstack_visual_indexes),
        sizes=tuple(_parsed(sizes, settings) if sizes else _default(settings)),
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        temporal_patch_size=settings.temporal_patch_size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def check_sizes(model: GatedModel, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises :class:`ConfigError` for picture sizes, in patches, that the model's encoder cannot have."""
    if not isinstance(model, GatedVisionModel):
        if sizes:
            raise ConfigError("picture sizes are for models that read pictures, and this one reads text only")
        return
    if not sizes:
        raise ConfigError("a model that reads pictures is exported for picture sizes: give at least one")
    merge = model.base.config.vision_config.spatial_merge_size
    for size in sizes:
        if any(side < 1 or side % merge for side in size):
            raise ConfigError(f"picture size {size[0]} x {size[1]} in patches: give multiples of {merge}")


def _parsed(sizes: Sequence[str], settings: PatchSettings) -> list[tuple[int, int]]:
    found = []
    for size in sizes:
        match = _SIZE.fullmatch(size)
        width, height = map(int, match.groups()) if match else (0, 0)
        if min(width, height) < 1 or width % settings.factor or height % settings.factor:
            raise ConfigError(
                f"--image-sizes {size}: give WIDTHxHEIGHT in pixels, both multiples of {settings.factor}, such as "
                f"{16 * settings.factor}x{16 * settings.factor}"
            )
        if width * height > settings.max_pixels:
            raise ConfigError(
                f"--image-sizes {size}: the model was made for pictures of at most {settings.max_pixels} pixels "
                f"({CONFIG_FILE}): choose a smaller size"
            )
        found.append((height // settings.patch_size, width // settings.patch_size))
    return found


def _default(settings: PatchSettings) -> list[tuple[int, int]]:
    pixels = min(_DEFAULT_PIXELS, settings.max_pixels)
    sizes = []
    for ratio in _RATIOS:
        sides = (math.sqrt(pixels * ratio), math.sqrt(pixels / ratio))
        down, across = (max(1, int(side / settings.factor + 1e-9)) * settings.merge_size for side in sides)
        sizes.append((down, across))
    return list(dict.fromkeys(sizes))
