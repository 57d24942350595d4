"""Conversations with pictures whose answers are known, by a seed; draws with Pillow and needs no torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from trimkv_edge.models.tiny.words import KEYS, VALUES
from trimkv_edge.models.tiny_vl.scenes import ATTRIBUTES, Scene, draw, places, random_scene

QUESTIONS = {
    "colour": "What colour is the {}?",
    "shape": "What shape is the {}?",
    "number": "What number is the {}?",
    "place": "Where is the {}?",
}


def question(key: str, attribute: str = "") -> str:
    """What the user asks about a picture's attribute, or about a fact."""
    return QUESTIONS.get(attribute, "What is the {}?").format(key)


def reply(key: str, value: str) -> str:
    """What the model says to it."""
    return f"The {key} is {value}."


def answers(scene: Scene) -> list[str]:
    """The attributes that may be asked; a place only where there is more than one."""
    return [name for name in ATTRIBUTES if name != "place" or len(places(scene.height, scene.width)) > 1]


@dataclass(frozen=True)
class Turn:
    """A user message and the reply that is right.

    Attributes:
        text: of the message; a picture stands behind it.
        reply: what the assistant has to say.
        kind: `picture`, `fact`, `picture question`, `text question`.
        image: the picture, if there is one.
        key: what is spoken about (of a fact: the first key).
    """

    text: str
    reply: str
    kind: str
    key: str
    image: Image.Image | None = None

    @property
    def content(self) -> str | list[dict[str, object]]:
        """As the chat template takes it."""
        if self.image is None:
            return self.text
        return [{"type": "text", "text": self.text}, {"type": "image", "image": self.image}]


def show(key: str, scene: Scene) -> Turn:
    """A picture that is called `key`."""
    return Turn(f"Look at the {key}", "Noted.", "picture", key, draw(scene))


def state(facts: dict[str, str]) -> Turn:
    """Facts to be remembered."""
    said = "; ".join(f"the {key} is {value}" for key, value in facts.items())
    return Turn(f"Remember: {said}.", "Noted.", "fact", next(iter(facts)))


def ask(key: str, value: str, attribute: str = "") -> Turn:
    """A question about a picture's attribute, or without one about a fact."""
    kind = "picture question" if attribute else "text question"
    return Turn(question(key, attribute), reply(key, value), kind, key)


def rounds(seed: int, pictures: int, facts: int, questions: int, size: tuple[int, int] | None = None) -> Iterator[Turn]:
    """Without end: a round shows `pictures`, states `facts`, and then asks `questions` about those of the round, of
    either kind in turn. Keys come again after 99, and then stand for the newest.

    Args:
        size: height and width in pixels of all pictures, by default any of `scenes.SIZES`.
    """
    rng = random.Random(f"rounds {seed}")
    names: list[str] = []
    while True:
        if len(names) < pictures + facts:
            names = rng.sample(KEYS, len(KEYS))
        scenes = {names.pop(): random_scene(rng, size) for _ in range(pictures)}
        stated = {names.pop(): rng.choice(VALUES) for _ in range(facts)}
        said: list[Turn] = [show(key, scene) for key, scene in scenes.items()]
        said += [state({key: value}) for key, value in stated.items()]
        rng.shuffle(said)
        yield from said
        asked = [ask(key, s.answer(name), name) for key, s in scenes.items() for name in answers(s)]
        rng.shuffle(asked)
        told = [ask(key, value) for key, value in stated.items()]
        rng.shuffle(told)
        both = [turn for pair in zip(asked, told, strict=False) for turn in pair] or asked or told
        yield from both[:questions]
