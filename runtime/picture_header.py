"""What the header of a picture file says, read before any decoder sees the file.

Decoders work through the parts of a file (segments, chunks, blocks) one at a time and some keep each of them, so a file
of very many tiny parts takes far more time and memory than its pixels do. Their number is bounded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

from trimkv_edge.errors import ConfigError

FORMATS = "PNG, JPEG, WebP, GIF or BMP"
PARTS = 2**18
SCANS = 256  # a progressive JPEG has about ten; each one goes over all pixels
_NO_SIZE = frozenset((0xC4, 0xC8, 0xCC))  # of JPEG's C0 to CF, those that are no frame headers
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # JPEG markers without a length


class PictureError(ConfigError):
    """A picture file is damaged, of another format, or larger than the limits."""


@dataclass(frozen=True)
class Header:
    """Format (Pillow's name), size in pixels before the orientation is applied, and whether there are more frames."""

    format: str
    width: int
    height: int
    animated: bool = False


def read_header(data: bytes) -> Header:
    """The header of a whole file.

    Raises:
        PictureError: another format, no size, more parts than ``PARTS``, a JPEG of more than ``SCANS`` scans, or a
            run-length coded BMP. The message lacks the file's name.
    """
    for magic, read in _READERS.items():
        if data.startswith(magic):
            try:
                return read(data)
            except IndexError as error:
                raise PictureError("ends inside its header") from error
    raise PictureError(f"is not {FORMATS}")


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise PictureError("is a PNG without a header")
    found = Header("PNG", _number(data, 16, 4, "big"), _number(data, 20, 4, "big"))
    at = 8
    for parts in count():
        kind = data[at + 4 : at + 8]
        if len(kind) < 4 or kind == b"IEND":
            return found
        _check_parts(parts)
        if kind == b"acTL":
            found = replace(found, animated=_number(data, at + 8, 4, "big") > 1)
        at += 12 + _number(data, at, 4, "big")
    raise AssertionError


def _jpeg(data: bytes) -> Header:
    scans = data.count(b"\xff\xda")
    if scans > SCANS:
        raise PictureError(f"is a JPEG of {scans} scans, but at most {SCANS} are read")
    at, found = 2, None
    for parts in count():
        _check_parts(parts)
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0xD9, 0xDA):
            break
        if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZE:
            found = Header("JPEG", _number(data, at + 7, 2, "big"), _number(data, at + 5, 2, "big"))
        if marker == 0xFF:  # filling
            at += 1
        else:
            at += 2 if marker in _ALONE else 2 + _number(data, at + 2, 2, "big")
    if found is None:
        raise PictureError("is a JPEG without a frame header")
    return found


def _gif(data: bytes) -> Header:
    found = Header("GIF", _number(data, 6, 2), _number(data, 8, 2))
    at, images, blocks = 13 + _palette(data[10]), 0, 0
    while at < len(data) and data[at] != 0x3B:
        blocks += 1
        kind = data[at]
        if kind == 0x2C:
            images += 1
            if images > 1:
                return replace(found, animated=True)
            # The first frame may reach over the screen, which then grows.
            right, bottom = (_number(data, at + n, 2) + _number(data, at + n + 4, 2) for n in (1, 3))
            found = replace(found, width=max(found.width, right), height=max(found.height, bottom))
            at += 11 + _palette(data[at + 9])
        else:
            at += 2 if kind == 0x21 else 1
        if kind in (0x21, 0x2C):
            while at < len(data) and data[at]:
                blocks += 1
                _check_parts(blocks)
                at += 1 + data[at]
            at += 1
        _check_parts(blocks)
    return found


def _palette(flags: int) -> int:
    """Bytes of a GIF's palette."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if data[8:12] != b"WEBP" or kind not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise PictureError("is a RIFF file, but not a WebP picture")
    if kind == b"VP8X":
        width, height = _number(data, 24, 3) + 1, _number(data, 27, 3) + 1
    elif kind == b"VP8L":
        bits = _number(data, 21, 4)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = _number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF
    at, frames = 12, 0
    for parts in count():
        _check_parts(parts)
        if at + 8 > len(data):
            return Header("WEBP", width, height, frames > 1)
        frames += data[at : at + 4] == b"ANMF"
        size = _number(data, at + 4, 4)
        at += 8 + size + size % 2
    raise AssertionError


def _bmp(data: bytes) -> Header:
    if _number(data, 14, 4) == 12:
        return Header("BMP", _number(data, 18, 2), _number(data, 20, 2))
    if _number(data, 30, 4) in (1, 2):
        raise PictureError("is a run-length coded BMP, which is not read: convert it to PNG")
    # A negative height: the first line is the top one.
    return Header("BMP", _number(data, 18, 4), abs(int.from_bytes(data[22:26], "little", signed=True)))


def _number(data: bytes, at: int, length: int, order: str = "little") -> int:
    """Raises IndexError past the end."""
    if at + length > len(data):
        raise IndexError(at)
    return int.from_bytes(data[at : at + length], "big" if order == "big" else "little")


def _check_parts(parts: int) -> None:
    if parts > PARTS:
        raise PictureError(f"has more than {PARTS} parts: save it again with an image program")


_READERS: dict[bytes, Callable[[bytes], Header]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"GIF8": _gif,
    b"RIFF": _webp,
    b"BM": _bmp,
}
