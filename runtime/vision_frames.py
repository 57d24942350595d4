"""Videos as frames: a folder of pictures, or an animation. All frames are checked first, then decoded one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimkv_edge.errors import ConfigError, reason
from trimkv_edge.runtime.picture import PictureLimits, checked_file, guarded, open_image, read_picture, to_rgb
from trimkv_edge.runtime.picture_header import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

FPS, MOST_FRAMES = 2.0, 768  # as transformers take for Qwen3-VL
_LEAST_FRAMES = 4
# Of an animation's file; each frame is decoded, shown or not.
_MOST_IN_FILE, _MOST_PIXELS = 2**13, 2**31
_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))
_CONTAINERS = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
)
_NO_TIME_MS = 100.0  # what browsers take for a frame that names no time


@dataclass(frozen=True)
class Video:
    """Frames of one size.

    Attributes:
        height, width: in pixels.
        seconds: of each frame, from the beginning.
        frames: gives them, mode RGB, decoded as they are asked for.
    """

    height: int
    width: int
    seconds: tuple[float, ...]
    frames: Callable[[], Iterator[Image]]


def open_video(path: Path, fps: float = FPS, most: int = MOST_FRAMES, limits: PictureLimits | None = None) -> Video:
    """Checks and measures a video; decodes each frame that will be shown once, so that none fails later.

    Args:
        path: a folder of pictures, in the order of their names (numbers by value), or an animated GIF, WebP or PNG.
        fps: of an animation: frames to show for a second, evenly spread, at least 4 in all. Of a folder: how many of
            its frames are a second; all are shown.
        most: frames to show; where there are more, so many evenly spread ones.
        limits: of each frame.

    Raises:
        ConfigError: ``fps`` or ``most`` out of range.
        PictureError: no video, damaged, over a limit, or frames of different sizes.
        TrimKVError: Pillow is not installed.
    """
    if not 0 < fps < float("inf"):
        raise ConfigError(f"{fps} frames per second were asked for, but it must be above 0")
    if isinstance(most, bool) or not isinstance(most, int) or most < 2:
        raise ConfigError(f"at most {most} frames were asked for, but it must be at least 2")
    limits = limits or PictureLimits()
    if path.is_dir():
        return _folder(path, fps, most, limits)
    name = str(path) if str(path).isprintable() else ascii(str(path))
    if path.suffix.lower() in _CONTAINERS and path.is_file():
        raise PictureError(
            f"{name} is a video file, which is not read: make a folder of its frames, for example with "
            f"ffmpeg -i {path.name} -vf fps={fps:g} FOLDER/%06d.png, and give that"
        )
    try:
        return _animation(path, fps, most, limits)
    except PictureError as error:
        raise PictureError(f"{name} {error}") from error


def spread(starts: list[float], count: int) -> list[int]:
    """Indices of the frames nearest to ``count`` evenly spread moments, from the first frame's to the last one's.

    Args:
        starts: of all frames, ascending.
        count: moments; one frame may be the nearest to several, and counts once.
    """
    times = np.linspace(0, starts[-1], count)
    nearest = np.interp(times, starts, np.arange(len(starts))).round().astype(int)
    return sorted(set(nearest.tolist()))


def _folder(path: Path, fps: float, most: int, limits: PictureLimits) -> Video:
    try:
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES), key=_by_number)
    except OSError as error:
        raise PictureError(f"{path} cannot be read ({reason(error)})") from error
    if not files:
        raise PictureError(f"{path} holds no frames: give a folder of PNG, JPEG, WebP, GIF or BMP files")
    starts = [index / fps for index in range(len(files))]
    shown = spread(starts, min(len(files), most))

    def frames() -> Iterator[Image]:
        for index in shown:
            yield read_picture(files[index], limits).image

    first: tuple[int, int] | None = None
    for index, image in zip(shown, frames(), strict=True):
        first = first or image.size
        if image.size != first:
            raise PictureError(
                f"{files[index]} has {image.width} x {image.height} pixels, but the frames before have {first[0]} x "
                f"{first[1]}: the frames of a video must have one size"
            )
    assert first is not None
    return Video(first[1], first[0], tuple(starts[index] for index in shown), frames)


def _by_number(file: Path) -> tuple[list[tuple[int, str]], str]:
    # Text and numbers take turns, beginning with text.
    parts = re.split(r"([0-9]+)", file.name)
    return [(int(part), "") if odd % 2 else (0, part) for odd, part in enumerate(parts)], file.name


def _animation(path: Path, fps: float, most: int, limits: PictureLimits) -> Video:
    data, header = checked_file(path, limits)
    if not header.animated:
        raise PictureError("holds one picture and no video: give an animation, a folder of frames, or a still picture")
    with guarded(header), open_image(data, header, limits) as image:
        count, size = int(getattr(image, "n_frames", 1)), image.size
        if count > _MOST_IN_FILE or count * size[0] * size[1] > _MOST_PIXELS:
            raise PictureError(
                f"has {count} frames of {size[0]} x {size[1]} pixels, but at most {_MOST_IN_FILE} and {_MOST_PIXELS} "
                "pixels in all are decoded: make a folder of the frames that matter"
            )
        starts, seconds = [], 0.0
        for index in range(count):
            _go_to(image, index, size)
            starts.append(seconds)
            seconds += (float(image.info.get("duration") or 0) or _NO_TIME_MS) / 1000
    shown = spread(starts, min(max(int(seconds * fps), _LEAST_FRAMES), most, count))

    def frames() -> Iterator[Image]:
        # Guarded frame by frame: whoever asks for them may decode other pictures in between.
        with guarded(header):
            image = open_image(data, header, limits)
        with image:
            for index in range(shown[-1] + 1):
                with guarded(header):
                    _go_to(image, index, size)
                    frame = to_rgb(image.copy()) if index in shown else None
                if frame is not None:
                    yield frame

    return Video(size[1], size[0], tuple(starts[index] for index in shown), frames)


def _go_to(image: Image, index: int, size: tuple[int, int]) -> None:
    image.seek(index)
    if image.size != size:
        raise PictureError(
            f"has a frame of {image.width} x {image.height} pixels among frames of {size[0]} x {size[1]}: the frames "
            "of a video must have one size"
        )
    image.load()
