"""Pictures from files that nobody vouches for: limits first, then Pillow, then upright RGB."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimkv_edge.budget import format_bytes
from trimkv_edge.errors import TrimKVError, first_line, reason
from trimkv_edge.runtime.picture_header import Header, PictureError, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's warnings go through the process's one list of filters; and so the memory bound is that of one picture.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class PictureLimits:
    """How large a picture may be; checked before it is decoded.

    Attributes:
        file_bytes: of the file.
        pixels: width x height, as stored. Decoding was seen to take up to 21 bytes for each, beside the file.
        side: the longer one, in pixels.

    Raises:
        PictureError: a limit below 1.
    """

    file_bytes: int = 32 * 2**20
    pixels: int = 2**25
    side: int = 2**14

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PictureError(f"picture limit {field.name} is {value!r}, but must be a whole number >= 1")


@dataclass(frozen=True)
class DecodedPicture:
    """A picture as one looks at it.

    Attributes:
        image: mode RGB, EXIF orientation applied, transparent parts on white.
        animated: the file holds more frames; this is the first one.
    """

    image: Image
    animated: bool


def read_picture(source: Path | bytes, limits: PictureLimits | None = None, name: str = "") -> DecodedPicture:
    """Decodes a PNG, JPEG, WebP, GIF or BMP.

    Greyscale, palette and CMYK pixels become RGB without colour profiles; of 16 bits the upper 8 count. Damaged EXIF
    data turns nothing; damaged pixels are an error.

    Args:
        source: a file, or what it holds.
        limits: None: the defaults.
        name: for messages; empty: the file's path, or ``the picture``.

    Raises:
        PictureError: not such a file, damaged, or over a limit.
        TrimKVError: Pillow is not installed.
    """
    limits = limits or PictureLimits()
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    name = name if name.isprintable() else ascii(name)
    try:
        data, header = checked_file(source, limits)
        return DecodedPicture(_decode(data, header, limits), header.animated)
    except PictureError as error:
        raise PictureError(f"{name} {error}") from error


def checked_file(source: Path | bytes, limits: PictureLimits) -> tuple[bytes, Header]:
    """What a picture file holds, and its header.

    Raises:
        PictureError: not a picture file, or over a limit; the message lacks the file's name.
    """
    data = _read(source, limits) if isinstance(source, Path) else source
    if len(data) > limits.file_bytes:
        raise PictureError(_over(len(data), limits))
    if not data:
        raise PictureError("is empty")
    header = read_header(data)
    _check_size(header.width, header.height, limits)
    return data, header


def _read(path: Path, limits: PictureLimits) -> bytes:
    try:
        # Pipes and devices have no size, and reading them may never end.
        if not path.is_file():
            raise PictureError("is a folder or a device: give a file" if path.exists() else "does not exist")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > limits.file_bytes:
                raise PictureError(_over(size, limits))
            return file.read(limits.file_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"cannot be read ({reason(error)})") from error


def _over(size: int, limits: PictureLimits) -> str:
    return f"has {format_bytes(size)}, but at most {format_bytes(limits.file_bytes)} are read: make it smaller"


def _check_size(width: int, height: int, limits: PictureLimits) -> None:
    if min(width, height) < 1:
        raise PictureError(f"has {width} x {height} pixels: it is empty or its header is damaged")
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise PictureError(
            f"has {width} x {height} pixels, but at most {limits.pixels} and {limits.side} a side are read: make it "
            "smaller"
        )


def _decode(data: bytes, header: Header, limits: PictureLimits) -> Image:
    with guarded(header), open_image(data, header, limits) as image:
        image.load()
        return to_rgb(_upright(image))


@contextmanager
def guarded(header: Header) -> Iterator[None]:
    """A block in which Pillow decodes: no other one runs at the same time, and warnings are off.

    Raises:
        PictureError: for whatever Pillow raises; the message lacks the file's name.
        TrimKVError: Pillow is not installed.
    """
    try:
        # Named, or Pillow would look for them among the readers of all its formats.
        from PIL import (  # noqa: F401
            BmpImagePlugin,
            GifImagePlugin,
            JpegImagePlugin,
            PngImagePlugin,
            UnidentifiedImageError,
            WebPImagePlugin,
        )
    except ImportError as error:
        raise TrimKVError(f"pictures need Pillow ({error}): pip install 'trimkv-edge[vision]'") from error
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except PictureError:
            raise
        except UnidentifiedImageError as error:
            raise PictureError(f"is damaged: its {header.format} header cannot be read") from error
        except Exception as error:  # Pillow's readers raise what their mistakes happen to be, of every kind
            raise PictureError(f"is damaged or not supported ({first_line(error)}): save it again as PNG") from error


def open_image(data: bytes, header: Header, limits: PictureLimits) -> Image:
    """The file in Pillow, not decoded yet; in a :func:`guarded` block."""
    from PIL import Image as pillow

    image = pillow.open(io.BytesIO(data), formats=[header.format])
    # A file can hold two headers.
    _check_size(*image.size, limits)
    return image


def _upright(image: Image) -> Image:
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image) -> Image:
    """Mode RGB: transparent parts on white, the upper 8 of 16 bits."""
    from PIL import Image as pillow

    clear = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = pillow.fromarray((values >> 8).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(pillow.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255))))
    if clear is None and "A" not in image.getbands() and "a" not in image.getbands():
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = pillow.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image)
    return white
