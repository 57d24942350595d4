"""Pictures that are noted while a stream is read, against Pillow's own resizing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from vision_text_artefact import noise, png

from trimkv_edge.manifest import VisionInfo
from trimkv_edge.runtime.seen_pictures import SeenPicture, joined, noting
from trimkv_edge.runtime.vision import PictureReader, Shown
from trimkv_edge.runtime.vision_text import Reading

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def info(*sizes: tuple[int, int], patch: int = 4, merge: int = 2, together: int = 2, plain: bool = False) -> VisionInfo:
    half = (0.5, 0.5, 0.5)
    mean, std = (half, half) if plain else (MEAN, STD)
    return VisionInfo(316, 317, 318, 319, 1, sizes, patch, merge, together, mean, std)


def resized(image: Image.Image, down: int, across: int) -> npt.NDArray[np.uint8]:
    """As the encoder is to see it, sides in pixels."""
    return np.asarray(image.resize((across, down), Image.Resampling.BICUBIC))


def opened(picture: SeenPicture) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(picture.png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("patch", "merge", "together"), [(4, 2, 2), (16, 2, 2), (3, 1, 1), (2, 4, 3)])
def test_patches_become_the_picture_again(patch: int, merge: int, together: int, plain: bool) -> None:
    image = noise(3, 50, 31)
    vision = info((4, 8), patch=patch, merge=merge, together=together, plain=plain)
    patches = next(PictureReader(vision).image(png(image)).patches())
    np.testing.assert_array_equal(joined(patches, vision), resized(image, 4 * patch, 8 * patch))


def test_each_picture_is_noted_when_it_is_read(tmp_path: Path) -> None:
    for number in range(5):
        noise(number, 16, 24).save(tmp_path / f"{number}.png")
    vision = info((4, 6), (6, 4))
    reader = PictureReader(vision)
    a, film, b = noise(10), reader.video(tmp_path, 2.0), noise(11, 16, 24)
    shown = (reader.image(png(a)), film, reader.image(png(b)))
    reading, seen = noting(Reading([7] * 60, (3, 14, 23, 32, 41), shown), vision)
    assert (reading.tokens, reading.starts, seen) == ([7] * 60, (3, 14, 23, 32, 41), [])
    assert [(one.kind, one.rows, one.seconds) for one in reading.shown] == [
        (one.kind, one.rows, one.seconds) for one in shown
    ]
    first = next(reading.shown[0].patches())
    np.testing.assert_array_equal(first.pixel_values, next(shown[0].patches()).pixel_values)
    assert len(seen) == 1
    groups = reading.shown[1].patches()
    assert len(seen) == 1
    for count in (2, 3, 4):
        next(groups)
        assert len(seen) == count
    next(reading.shown[2].patches())
    told = [(one.label, one.start, one.down, one.across, one.side, one.rows) for one in seen]
    assert told == [
        ("image 1", 3, 2, 3, 8, 6),
        ("video 1, 0.2 s", 14, 3, 2, 8, 6),
        ("video 1, 1.2 s", 23, 3, 2, 8, 6),
        ("video 1, 2.0 s", 32, 3, 2, 8, 6),
        ("image 2", 41, 3, 2, 8, 6),
    ]
    # Of a frame group its first frame.
    want = [a, noise(0, 16, 24), noise(2, 16, 24), noise(4, 16, 24), b]
    for picture, image in zip(seen, want, strict=True):
        np.testing.assert_array_equal(opened(picture), resized(image, picture.down * 8, picture.across * 8))


def test_pictures_of_a_long_stream_are_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = info((16, 32), patch=4)
    one = PictureReader(vision).image(png(noise(1, 128, 64)))

    def sizes(count: int) -> list[tuple[int, ...]]:
        shown: tuple[Shown, ...] = (one,) * count
        reading, seen = noting(Reading([7] * 2000, tuple(range(count)), shown), vision)
        for picture in reading.shown:
            next(picture.patches())
        return [opened(picture).shape[:2] for picture in seen]

    assert sizes(1) == [(64, 128)]
    monkeypatch.setattr("trimkv_edge.runtime.seen_pictures.MOST_PIXELS", 10_000)
    assert sizes(1) == [(50, 100)]
    many = sizes(9)
    assert len(set(many)) == 1
    assert 10_000 / 3 < sum(height * width for height, width in many) <= 10_000
    monkeypatch.setattr("trimkv_edge.runtime.seen_pictures.MOST_PIXELS", 4)
    assert set(sizes(9)) == {(1, 1)}


def test_where_a_row_is() -> None:
    picture = SeenPicture("image", 2, None, 5, 2, 3, 16, b"")
    boxes = [(0, 0, 16, 16), (16, 0, 32, 16), (32, 0, 48, 16), (0, 16, 16, 32), (16, 16, 32, 32), (32, 16, 48, 32)]
    assert [picture.box(row) for row in range(picture.rows)] == boxes
    assert picture.label == "image 2"
