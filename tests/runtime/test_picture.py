"""Reading picture files: hand-made pixels in every mode, limits, and files that were damaged on purpose."""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.runtime.picture import PictureError, PictureLimits, read_picture
from trimkv_edge.runtime.picture_header import read_header

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
NO_EXIF = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x00"
SMALL = PictureLimits(file_bytes=2**20, pixels=2**18, side=1024)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    image = read_picture(data).image
    assert image.mode == "RGB"
    return np.asarray(image)


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand."""
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def refusal(source: bytes | Path, limits: PictureLimits | None = None) -> str:
    with pytest.raises(PictureError) as error:
        read_picture(source, limits)
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert isinstance(error.value, ConfigError)
    return text


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_formats_without_loss_give_their_pixels(kind: str) -> None:
    want = noise(7, 5)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(want), kind)), want)


def test_lossless_webp_gives_its_pixels() -> None:
    want = noise(7, 5)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(want), "WEBP", lossless=True)), want)


def test_jpeg_is_near_its_pixels() -> None:
    flat = np.full((16, 24, 3), (200, 40, 90), np.uint8)
    got = pixels(saved(Image.fromarray(flat), "JPEG", quality=95)).astype(int)
    assert np.abs(got - flat).max() <= 2


def test_greyscale_fills_three_channels() -> None:
    grey = noise(4, 6, 1)[..., 0]
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))


def test_one_bit_pictures_are_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(pixels(saved(bits, "PNG"))[..., 1], [[0, 255], [255, 0]])


def test_of_16_bits_the_upper_8_count() -> None:
    deep = np.array([[0x0000, 0x00FF, 0x0100, 0xABCD, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(deep), "PNG"))[0, :, 0], [0, 0, 1, 0xAB, 0xFF])


def test_a_clear_grey_of_16_bits_becomes_white() -> None:
    rows = b"\x00" + struct.pack(">3H", 0x1234, 0x5678, 0x1235)
    header = struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)
    data = png(header, (b"tRNS", struct.pack(">H", 0x1234)), (b"IDAT", zlib.compress(rows)))
    np.testing.assert_array_equal(pixels(data)[0, :, 2], [255, 0x56, 0x12])


def test_palettes_are_looked_up() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    want = [[70, 80, 90], [10, 20, 30], [40, 50, 60]]
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(pixels(saved(image, kind))[0], want)


def test_a_clear_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(pixels(saved(image, kind, transparency=0))[0], [[255] * 3, [40, 50, 60]])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composed_on_white(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    raw = noise(9, 8, 4)
    alpha = raw[..., 3:] / 255
    want = np.rint(raw[..., :3] * alpha + 255 * (1 - alpha))
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(raw), kind, **options)), want)


def test_cmyk_jpegs_become_rgb() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    red = pixels(saved(ink, "JPEG", quality=95))[8, 8].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4


# A picture of 2 x 3 numbered pixels, as each orientation of EXIF 2.32 shows it.
UPRIGHT = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
    9: [[0, 1, 2], [3, 4, 5]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(data)[..., 0], UPRIGHT[orientation])


def test_damaged_exif_turns_nothing() -> None:
    want = noise(3, 4)
    data = saved(Image.fromarray(want), "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(data), want)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    found = read_picture(data)
    assert found.animated
    np.testing.assert_array_equal(np.asarray(found.image)[3, 4], [255, 0, 0])
    assert not read_picture(saved(frames[0], kind)).animated


@pytest.mark.parametrize("kind", FORMATS)
def test_headers_say_the_size(kind: str) -> None:
    found = read_header(saved(Image.new("RGB", (37, 21)), kind))
    assert (found.format, found.width, found.height) == (kind, 37, 21)


def test_lossless_and_extended_webp_headers_say_the_size() -> None:
    image = Image.new("RGBA", (300, 21))
    for options in ({"lossless": True}, {"exif": NO_EXIF}):
        found = read_header(saved(image, "WEBP", **options))
        assert (found.width, found.height) == (300, 21)


def test_files_are_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    want = noise(4, 4)
    path.write_bytes(saved(Image.fromarray(want), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_picture(path).image), want)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    assert "folder or a device" in refusal(tmp_path)
    assert "folder or a device" in refusal(fifo)
    assert "folder or a device" in refusal(Path("/dev/zero"))
    assert "does not exist" in refusal(tmp_path / "b.png")
    (tmp_path / "two\nlines.png").write_bytes(b"x")
    assert "two\\nlines.png' is not PNG" in refusal(tmp_path / "two\nlines.png")


def test_limits_count_what_they_say(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 30))
    data = saved(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    read_picture(data, PictureLimits(file_bytes=len(data), pixels=600, side=30))
    for source in (data, path):
        assert "at most" in refusal(source, PictureLimits(file_bytes=len(data) - 1))
    assert "30 x 20 pixels, but at most 599" in refusal(data, PictureLimits(pixels=599))
    assert "29 a side" in refusal(data, PictureLimits(side=29))


@pytest.mark.parametrize("field", ["file_bytes", "pixels", "side"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_limits_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        PictureLimits(**{field: value})


def bombs() -> dict[str, bytes]:
    """Small files that say they are huge."""
    line = zlib.compress(bytes(2**20))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    jpeg = bytearray(saved(Image.new("RGB", (16, 16)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    canvas = bytearray(
        saved(Image.new("RGBA", (16, 16)), "WEBP", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x00")
    )
    canvas[24:30] = (16_382).to_bytes(3, "little") * 2
    gif = bytearray(saved(Image.new("P", (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    frame_gif = bytearray(saved(Image.new("P", (16, 16)), "GIF"))
    local = frame_gif.index(b"\x2c", 13)
    frame_gif[local + 5 : local + 9] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(saved(Image.new("RGB", (16, 16)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2_000_000, -2_000_000)
    return {
        "png": png(header, (b"IDAT", line)),
        "jpeg": bytes(jpeg),
        "webp": bytes(canvas),
        "gif": bytes(gif),
        "gif-frame": bytes(frame_gif),
        "bmp": bytes(bmp),
    }


@pytest.mark.parametrize("kind", bombs())
def test_bombs_are_refused_in_little_memory(kind: str) -> None:
    data = bombs()[kind]
    refusal(data)  # modules are imported
    tracemalloc.start()
    text = refusal(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "but at most" in text
    assert peak < 2**20


def test_a_second_header_does_not_raise_the_size() -> None:
    small, large = (struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0) for side in (16, 8000))
    data = png(small, (b"IHDR", large), (b"IDAT", zlib.compress(bytes(2**20))))
    assert read_header(data).width == 16
    assert "8000 x 8000 pixels, but at most" in refusal(data)


def test_many_tiny_parts_are_refused_fast() -> None:
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    text = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    gif = saved(Image.new("P", (4, 4)), "GIF")[:13]
    files = {
        "png": png(header)[:33] + text * 2_000_000,
        "jpeg": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 6_000_000,
        "filled jpeg": b"\xff\xd8" + b"\xff" * 20_000_000,
        "gif": gif[:10] + b"\x00\x00\x00" + b"\x21\xfe" + b"\x01a" * 10_000_000,
        "unknown gif": gif[:10] + b"\x00\x00\x00" + b"\x01" * 20_000_000,
        "webp": saved(Image.new("RGB", (4, 4)), "WEBP") + b"ABCD\x00\x00\x00\x00" * 3_000_000,
    }
    for kind, data in files.items():
        start = time.perf_counter()
        assert "parts" in refusal(data), kind
        assert time.perf_counter() - start < 5, kind


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = saved(Image.fromarray(noise(32, 32)), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") > 1
    read_picture(data)
    assert "scans" in refusal(data + b"\xff\xda" * 256)


def test_run_length_bmps_are_refused() -> None:
    data = bytearray(saved(Image.new("P", (16, 16)), "BMP"))
    data[30:34] = struct.pack("<I", 1)
    assert "run-length" in refusal(bytes(data))


def test_empty_and_other_files_are_refused() -> None:
    assert "is empty" in refusal(b"")
    for data in (b"hello", b"%PDF-1.7", b"II*\x00" + bytes(64), b"RIFF\x00\x00\x00\x00WAVEfmt "):
        assert "the picture is" in refusal(data)
    zero = struct.pack(">IIBBBBB", 0, 16, 8, 2, 0, 0, 0)
    assert "0 x 16 pixels" in refusal(png(zero))
    channels = struct.pack(">IIBBBBB", 4, 4, 8, 5, 0, 0, 0)  # no such kind of colour
    assert "damaged" in refusal(png(channels, (b"IDAT", zlib.compress(bytes(68)))))


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_damaged(kind: str) -> None:
    data = saved(Image.fromarray(noise(40, 40)), kind)
    assert "damaged" in refusal(data[: len(data) // 2])


def originals() -> list[bytes]:
    rgb, rgba = Image.fromarray(noise(24, 40)), Image.fromarray(noise(24, 40, 4))
    frames = [Image.fromarray(noise(24, 40, seed=seed)) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [saved(rgb, kind) for kind in FORMATS]
    found += [saved(rgb, "JPEG", progressive=True, exif=exif), saved(rgb.convert("CMYK"), "JPEG")]
    found += [saved(rgba, "PNG"), saved(rgba, "WEBP", exif=exif), saved(rgba, "WEBP", lossless=True)]
    found += [saved(rgb.convert("P"), "PNG"), saved(rgb.convert("P"), "BMP"), saved(rgb.convert("1"), "BMP")]
    return found + [saved(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "GIF", "WEBP")]


def damaged(data: bytes, number: int, chance: random.Random) -> bytes:
    """One of: cut off, flipped bytes (all over, or in the header), another magic, absurd numbers, a part repeated."""
    found = bytearray(data)
    if number % 6 == 0:
        return data[: chance.randrange(len(data))]
    if number % 6 in (1, 2):
        reach = len(found) if number % 6 == 1 else min(64, len(found))
        for _ in range(chance.randrange(1, 12)):
            found[chance.randrange(reach)] ^= chance.randrange(1, 256)
    elif number % 6 == 3:
        found[: chance.randrange(1, 13)] = chance.randbytes(chance.randrange(1, 13))
    elif number % 6 == 4:
        at = chance.randrange(min(64, len(found)))
        found[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    else:
        start = chance.randrange(len(found))
        found[start:start] = found[start : start + chance.randrange(1, 400)] * chance.randrange(1, 5)
    return bytes(found)


def test_damaged_files_decode_or_give_one_line() -> None:
    chance = random.Random(5)
    sources, read, lines, slowest = originals(), 0, [], 0.0
    for number in range(960):
        data = damaged(sources[number % len(sources)], number // len(sources), chance)
        start = time.perf_counter()
        try:
            image = read_picture(data, SMALL).image
        except PictureError as error:
            lines.append(str(error))
        else:
            read += 1
            assert image.mode == "RGB"
            assert image.width * image.height <= SMALL.pixels
        slowest = max(slowest, time.perf_counter() - start)
    assert read > 50
    assert len(lines) > 300
    assert all(0 < len(line) < 300 and line.isprintable() for line in lines)
    assert slowest < 2


def test_without_pillow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (4, 4)), "PNG")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TrimKVError, match=r"trimkv-edge\[vision\]"):
        read_picture(data)
