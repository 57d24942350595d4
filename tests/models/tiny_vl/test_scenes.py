"""Pictures of `tiny-vl` show what their scene says: looked at by their pixels, not by the code that draws them."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trimkv_edge.models.tiny_vl.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZES,
    Scene,
    draw,
    frames,
    places,
    random_scene,
)

# Hues in degrees of the coloured ones, read off a colour wheel.
HUES = {"red": 0, "orange": 31, "yellow": 56, "green": 130, "blue": 228, "purple": 283, "pink": 334}


def coloured(image: Image.Image) -> np.ndarray:
    """Where a picture is far from grey, bool [height, width]."""
    return np.ptp(np.asarray(image).astype(int), axis=-1) > 60


def seen_hue(image: Image.Image) -> float:
    """The median hue of what is coloured, in degrees; red lies around 0."""
    hue = np.asarray(image.convert("HSV"))[..., 0][coloured(image)].astype(float) * 360 / 256
    return float(np.median((hue + 20) % 360) - 20)


@pytest.mark.parametrize("colour", HUES)
@pytest.mark.parametrize("size", SIZES)
def test_the_shape_has_the_colour(colour: str, size: tuple[int, int]) -> None:
    for seed in range(8):
        scene = replace(random_scene(random.Random(seed), size), colour=colour)
        found = seen_hue(draw(scene))
        nearest = min(HUES, key=lambda name: abs((found - HUES[name] + 180) % 360 - 180))
        assert nearest == colour


def test_white_is_bright_and_not_coloured() -> None:
    for seed in range(20):
        image = draw(replace(random_scene(random.Random(seed)), colour="white", shape="square"))
        assert coloured(image).mean() < 0.02
        assert (np.asarray(image).min(-1) > 220).sum() > 150


@pytest.mark.parametrize("size", SIZES)
def test_the_shape_stands_at_its_place(size: tuple[int, int]) -> None:
    height, width = size
    for place in places(height, width):
        for seed in range(8):
            scene = replace(random_scene(random.Random(seed), size), place=place, colour="blue", shape="circle")
            down, across = (axis.mean() for axis in np.nonzero(coloured(draw(scene))))
            low, right = (down + 0.5) / height - 0.5, (across + 0.5) / width - 0.5
            expected = "middle"
            if max(abs(low), abs(right)) > 0.11:
                sideways = abs(right) * width > abs(low) * height
                expected = ("left" if right < 0 else "right") if sideways else ("top" if low < 0 else "bottom")
            assert place == expected


def test_shapes_fill_their_boxes_differently() -> None:
    """Share of the box around the coloured pixels that is coloured, and of its middle column's upper quarter."""
    for seed in range(6):
        filled = {}
        for shape in SHAPES:
            scene = replace(random_scene(random.Random(seed), (64, 64)), shape=shape, colour="red", number="1")
            mask = coloured(draw(scene))
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            filled[shape] = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean()
        assert filled["square"] > filled["circle"] > max(filled["triangle"], filled["cross"])
        assert min(filled["triangle"], filled["cross"]) > filled["star"]
        assert filled["ring"] < filled["circle"] - 0.2


def test_numbers_differ_and_nothing_else_does() -> None:
    """Ink: pixels that change with the digit lie in the shape's middle, and every digit has its own."""
    scene = Scene("yellow", "circle", "0", "middle", 64, 64, seed=3)
    pictures = [np.asarray(draw(replace(scene, number=number))).astype(int) for number in NUMBERS]
    for first in range(len(pictures)):
        for second in range(first):
            changed = np.abs(pictures[first] - pictures[second]).max(-1) > 60
            rows, columns = np.nonzero(changed)
            assert changed.sum() > 10
            assert rows.min() > 16 < columns.min()
            assert rows.max() < 48 > columns.max()


def test_the_same_scene_is_the_same_picture() -> None:
    scene = random_scene(random.Random(5))
    again = random_scene(random.Random(5))
    assert scene == again
    assert draw(scene).tobytes() == draw(again).tobytes()
    assert draw(replace(scene, seed=scene.seed + 1)).tobytes() != draw(scene).tobytes()


def test_frames_of_a_video_show_the_same_with_a_tremble() -> None:
    scene = replace(random_scene(random.Random(9), (64, 96)), colour="green", shape="circle")
    shots = frames(scene, 4)
    centres = [np.mean(np.nonzero(coloured(shot)), 1) for shot in shots]
    assert shots[0].tobytes() == draw(scene).tobytes()
    assert len({shot.tobytes() for shot in shots}) == 4
    assert all(np.abs(centre - centres[0]).max() < 3.5 for centre in centres)
    assert max(np.abs(centre - centres[0]).max() for centre in centres) > 0.5


def test_sizes_are_whole_rows_of_the_stream() -> None:
    assert all(side % 16 == 0 for size in SIZES for side in size)
    for size in SIZES:
        picture = draw(random_scene(random.Random(0), size))
        assert (picture.height, picture.width, picture.mode) == (*size, "RGB")
    assert set(COLOURS) == {*HUES, "white"}
