"""The pictures of `tiny-vl`: one shape with a digit in it, drawn from a seed; what they show is known. No torch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 40),
    "green": (40, 165, 60),
    "blue": (35, 70, 215),
    "purple": (135, 45, 170),
    "pink": (245, 140, 185),
    "white": (248, 248, 248),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring", "star")
NUMBERS: tuple[str, ...] = tuple("0123456789")
PLACES: tuple[str, ...] = ("middle", "left", "right", "top", "bottom")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "number": NUMBERS,
    "place": PLACES,
}
# (height, width) in pixels; 32 x 32 pixels are 4 rows of the stream.
SIZES: tuple[tuple[int, int], ...] = ((64, 64), (64, 96), (96, 64), (32, 64), (32, 32))


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `seed` decides the background, the shape's size and small shifts."""

    colour: str
    shape: str
    number: str
    place: str
    height: int
    width: int
    seed: int

    def answer(self, attribute: str) -> str:
        """The word for one of `ATTRIBUTES`."""
        answer: str = getattr(self, attribute)
        return answer


def places(height: int, width: int) -> tuple[str, ...]:
    """Where a shape can stand in a picture of this size."""
    wide, high = ("left", "right") if width >= 64 else (), ("top", "bottom") if height >= 64 else ()
    return ("middle", *wide, *high)


def random_scene(rng: random.Random, size: tuple[int, int] | None = None) -> Scene:
    """Any scene, of `size` (height, width) or of one of `SIZES`."""
    height, width = size or rng.choice(SIZES)
    return Scene(
        rng.choice(tuple(COLOURS)),
        rng.choice(SHAPES),
        rng.choice(NUMBERS),
        rng.choice(places(height, width)),
        height,
        width,
        rng.randrange(2**32),
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture; the same scene is the same picture."""
    return frames(scene, 1)[0]


def frames(scene: Scene, count: int) -> list[Image.Image]:
    """A video of the scene: the shape trembles by up to two pixels from frame to frame."""
    rng = random.Random(scene.seed)
    background = _background(rng, scene)
    radius = rng.uniform(12.5, 14.5) if min(scene.height, scene.width) < 64 else rng.uniform(13.0, 17.0)
    x, y = _centre(rng, scene, radius)
    out = []
    for number in range(count):
        shift = (0, 0) if number == 0 else (rng.randint(-2, 2), rng.randint(-2, 2))
        out.append(_paint(rng, scene, background, radius, x + shift[0], y + shift[1]))
    return out


def _background(rng: random.Random, scene: Scene) -> npt.NDArray[np.float64]:
    """`[height, width, 3]`: a grey with a tint and a slope."""
    grey = rng.uniform(30, 130 if scene.colour == "white" else 210)
    tint = np.array([rng.uniform(-10, 10) for _ in range(3)])
    down, across = (np.linspace(-1, 1, side) * rng.uniform(-20, 20) for side in (scene.height, scene.width))
    return (grey + down[:, None] + across)[..., None] + tint


def _centre(rng: random.Random, scene: Scene, radius: float) -> tuple[float, float]:
    near = {"left": (0, None), "right": (1, None), "top": (None, 0), "bottom": (None, 1)}.get(scene.place, (None, None))
    out = []
    for side, end in zip((scene.width, scene.height), near, strict=True):
        slack = max(side / 2 - radius - 1, 0)
        if end is None:
            out.append(side / 2 + rng.uniform(-1, 1) * min(slack, 3))
        else:
            edge = radius + 1 + rng.uniform(0, 3)
            out.append(side - edge if end else edge)
    return out[0], out[1]


def _paint(
    rng: random.Random, scene: Scene, background: npt.NDArray[np.float64], radius: float, x: float, y: float
) -> Image.Image:
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8), "RGB")
    pen = ImageDraw.Draw(image)
    fill = COLOURS[scene.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        pen.ellipse(box, fill)
    elif scene.shape == "square":
        small = radius * 0.88
        pen.rectangle((x - small, y - small, x + small, y + small), fill)
    elif scene.shape == "ring":
        pen.ellipse(box, outline=fill, width=round(radius * 0.32))
    elif scene.shape == "cross":
        arm = radius * 0.42
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill)
    else:
        turns, inner = (3, 1.0) if scene.shape == "triangle" else (10, 0.5)
        corners = []
        for corner in range(turns):
            angle, far = 2 * math.pi * corner / turns - math.pi / 2, radius * (inner if corner % 2 else 1.0)
            corners.append((x + far * math.cos(angle), y + far * math.sin(angle)))
        pen.polygon(corners, fill)
    under = background[int(y), int(x)] if scene.shape == "ring" else np.array(fill)
    ink = (0, 0, 0) if under @ (0.299, 0.587, 0.114) > 125 else (255, 255, 255)
    low = radius * 0.12 if scene.shape == "triangle" else 0
    pen.text((x, y + low), scene.number, ink, font=_font(round(radius * 1.35)), anchor="mm")
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, rng.uniform(0, 7), (scene.height, scene.width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8), "RGB")


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
