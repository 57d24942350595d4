"""RGB pictures as Qwen3-VL's vision encoder reads them: sizes, resizing and patches as in transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.errors import ConfigError, reason
from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.picture_header import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG_FILE = "preprocessor_config.json"
LONGEST_RATIO = 200
_BICUBIC = 3
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


@dataclass(frozen=True)
class PatchSettings:
    """How pictures are cut; the defaults are Qwen3-VL's.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches a side that become one row of the stream.
        temporal_patch_size: frames in a patch; a picture stands in all of them.
        min_pixels, max_pixels: of the resized picture, width x height.
        mean, std: of the red, green and blue values in [0, 1], which are shifted and divided by them.

    Raises:
        ConfigError: a value is out of range.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 2**16
    max_pixels: int = 2**24
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= 1")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels is {self.min_pixels}, above max_pixels {self.max_pixels}: swap them")
        if self.max_pixels < self.factor**2:
            raise ConfigError(
                f"max_pixels is {self.max_pixels}, but one row of the stream has {self.factor**2}: raise it"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(value) for value in values):
                raise ConfigError(f"{name} is {values!r}, but must be three numbers, for red, green and blue")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std!r}, but must be above 0")

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def of(cls, vision: VisionInfo) -> PatchSettings:
        """Those of a manifest; its static sizes stand for the limits."""
        return cls(
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            mean=vision.mean,
            std=vision.std,
        )

    @classmethod
    def load(cls, path: Path) -> PatchSettings:
        """From a hub's ``preprocessor_config.json``, or the folder with it.

        Raises:
            ConfigError: missing, damaged, of another processor, without one of the settings, or with a step switched
                off or changed that is always done here.
        """
        path = path / CONFIG_FILE if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ConfigError("it is not an object")
            return cls._of(found)
        except KeyError as error:
            raise ConfigError(f"{path} has no {error.args[0]}: take the file of a Qwen3-VL model") from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be used ({reason(error)}): take the file of a Qwen3-VL model") from error

    @classmethod
    def _of(cls, found: dict[str, Any]) -> PatchSettings:
        kind = found["image_processor_type"]
        if kind not in _PROCESSORS:
            raise ConfigError(f"image_processor_type is {kind!r}, but must be {_PROCESSORS[0]} or its variants")
        fixed: dict[str, Any] = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        for name, value in {**fixed, "resample": _BICUBIC, "rescale_factor": 1 / 255}.items():
            if found.get(name) is not None and found[name] != value:
                raise ConfigError(f"{name} is {found[name]!r}, but only {value!r} is known")
        # The older names win, as in transformers.
        low, high = found.get("min_pixels"), found.get("max_pixels")
        return cls(
            patch_size=found["patch_size"],
            merge_size=found["merge_size"],
            temporal_patch_size=found["temporal_patch_size"],
            min_pixels=found["size"]["shortest_edge"] if low is None else low,
            max_pixels=found["size"]["longest_edge"] if high is None else high,
            mean=tuple(found["image_mean"]),
            std=tuple(found["image_std"]),
        )


@dataclass(frozen=True)
class PicturePatches:
    """A picture for the vision encoder.

    Attributes:
        pixel_values: float32 ``[patches, 3 * temporal_patch_size * patch_size^2]``; the patches of a row of the stream
            follow each other.
        grid_thw: int64 ``[1, 3]``: frame groups (1), patches down, patches across.
    """

    pixel_values: npt.NDArray[np.float32]
    grid_thw: npt.NDArray[np.int64]


def smart_size(height: int, width: int, settings: PatchSettings) -> tuple[int, int]:
    """Height and width in pixels that a picture is resized to: multiples of ``settings.factor``, about its own aspect
    ratio, and as many pixels as the settings allow.

    Raises:
        PictureError: one side is more than 200 times the other.
    """
    check_ratio(height, width)
    factor = settings.factor
    down, across = round(height / factor) * factor, round(width / factor) * factor
    if down * across > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        down, across = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif down * across < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        down, across = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return down, across


def check_ratio(height: int, width: int) -> None:
    """Raises :class:`PictureError` for an empty picture, or one with a side of more than 200 times the other."""
    if min(height, width) < 1:
        raise PictureError(f"a picture of {width} x {height} pixels is empty")
    if max(height, width) > LONGEST_RATIO * min(height, width):
        raise PictureError(
            f"a picture of {width} x {height} pixels is too narrow: the longer side may be {LONGEST_RATIO} times the "
            "other, so crop it"
        )


def choose_bucket(
    height: int, width: int, buckets: Sequence[tuple[int, int]], settings: PatchSettings
) -> tuple[int, int]:
    """The static size that changes a picture's aspect ratio least.

    Of equally good ones the smallest that holds all pixels of the picture, else the largest; then the first.

    Args:
        height, width: of the picture in pixels.
        buckets: (height, width) in patches.
        settings: give the size of a patch.

    Raises:
        ConfigError: no bucket, or one whose sides are not positive multiples of ``merge_size``.
        PictureError: as :func:`check_ratio`.
    """
    if not buckets:
        raise ConfigError("no picture size was given: name at least one")
    for bucket in buckets:
        if min(bucket) < 1 or any(side % settings.merge_size for side in bucket):
            raise ConfigError(
                f"picture size {bucket[0]} x {bucket[1]} patches: sides must be positive multiples of "
                f"{settings.merge_size}"
            )
    check_ratio(height, width)

    def badness(bucket: tuple[int, int]) -> tuple[Fraction, bool, int]:
        change = Fraction(height * bucket[1], width * bucket[0])
        pixels = bucket[0] * bucket[1] * settings.patch_size**2
        small = pixels < height * width
        return max(change, 1 / change), small, -pixels if small else pixels

    return min(buckets, key=badness)


def cut(image: Image, settings: PatchSettings, buckets: Sequence[tuple[int, int]] = ()) -> PicturePatches:
    """Resizes a picture (bicubic) and cuts it into patches.

    Args:
        image: mode RGB, of any size.
        settings: of the model.
        buckets: the static sizes to choose from, (height, width) in patches; empty: :func:`smart_size`.

    Raises:
        PictureError: not RGB, empty or too narrow.
        ConfigError: as :func:`choose_bucket`.
    """
    from PIL.Image import Resampling

    if image.mode != "RGB":
        raise PictureError(f"a picture of mode {image.mode} has not 3 channels of 8 bits: convert it to RGB")
    patch, merge = settings.patch_size, settings.merge_size
    if buckets:
        down, across = choose_bucket(image.height, image.width, buckets, settings)
    else:
        down, across = (side // patch for side in smart_size(image.height, image.width, settings))
    pixels = np.asarray(image.resize((across * patch, down * patch), Resampling.BICUBIC))
    parts = pixels.reshape(down // merge, merge, patch, across // merge, merge, patch, 3)
    parts = parts.transpose(0, 3, 1, 4, 6, 2, 5).reshape(down * across, 3, patch * patch)
    values = np.empty((down * across, 3, settings.temporal_patch_size, patch * patch), np.float32)
    for channel, table in enumerate(_tables(settings)):
        values[:, channel] = table[parts[:, channel]][:, None]
    return PicturePatches(values.reshape(down * across, -1), np.array([[1, down, across]], np.int64))


def _tables(settings: PatchSettings) -> npt.NDArray[np.float32]:
    """``[3, 256]``: what each value of a channel becomes, rounded where transformers round."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (settings.mean, settings.std))
    result: npt.NDArray[np.float32] = (scaled - mean) / std
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
