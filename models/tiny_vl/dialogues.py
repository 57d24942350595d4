"""Mixed dialogues for training and evaluation: `tiny`'s facts, questions and texts, with pictures between them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trimkv_edge.models.tiny import data as tiny
from trimkv_edge.models.tiny.data import ECHO, ORDINARY, RANDOM
from trimkv_edge.models.tiny.words import KEYS, VALUES
from trimkv_edge.models.tiny_vl.corpus import random_text
from trimkv_edge.models.tiny_vl.data import answers, question
from trimkv_edge.models.tiny_vl.scenes import Scene, frames, random_scene
from trimkv_edge.models.tiny_vl.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, load_tokenizer

# Kinds of tokens beside `tiny`'s: an answer about a picture, and a picture's row.
SEEN, ROW = 4, 5
ROW_PIXELS = 16
# Frame groups of what is shown: of ten, eight are images.
VIDEOS = (0, 0, 0, 0, 0, 0, 0, 0, 1, 2)


@lru_cache(maxsize=4096)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a short fixed phrase."""
    return tuple(load_tokenizer().encode(text).ids)


class Shown(NamedTuple):
    """A picture in a stream: where its first row is, and its one or two frames, uint8 [2, height, width, 3]."""

    start: int
    height: int
    width: int
    pixels: np.ndarray


@dataclass
class Mixed(tiny.Dialogue):
    """A dialogue that also has pictures; `scenes` are those named so far by their key."""

    scenes: dict[str, Scene] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)

    def add(self, text: str, kind: int = ORDINARY) -> None:
        """As for `tiny`, with this model's tokenizer."""
        self.extend(encode(text), kind)

    def show(self, key: str, scene: Scene, groups: int = 0) -> None:
        """A user message with a picture that is called `key`, or a video of `groups` of two frames, and the reply."""
        self.breaks.append(len(self.ids))
        self.add("<|im_start|>user\nLook at the")
        self.add(" " + key, RANDOM)
        shots = np.stack([np.asarray(shot) for shot in frames(scene, 2 * groups or 1)])
        height, width = scene.height // ROW_PIXELS, scene.width // ROW_PIXELS
        for first in range(0, len(shots), 2):
            self.add(VISION_START)
            self.shown.append(Shown(len(self.ids), height, width, shots[[first, min(first + 1, len(shots) - 1)]]))
            self.extend(encode(VIDEO_PAD if groups else IMAGE_PAD) * (height * width), ROW)
            self.add(VISION_END)
        self.add("<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n")
        self.scenes[key] = scene

    def ask_about(self, key: str, attribute: str) -> None:
        """A question about a picture, and its answer."""
        self.breaks.append(len(self.ids))
        before, after = question(key, attribute).split(key)
        self.add("<|im_start|>user\n" + before.rstrip())
        self.add(" " + key, RANDOM)
        self.add(after + "<|im_end|>\n<|im_start|>assistant\nThe")
        self.add(" " + key, ECHO)
        self.add(" is")
        self.add(" " + self.scenes[key].answer(attribute), SEEN)
        self.add(".<|im_end|>\n")

    def ask_any(self, rng: random.Random) -> None:
        """A question about any fact or picture so far; pictures are asked twice as often, having more to ask."""
        key = rng.choice([*self.facts, *self.scenes, *self.scenes])
        if key in self.facts:
            self.ask(key)
        else:
            self.ask_about(key, rng.choice(answers(self.scenes[key])))

    @property
    def names(self) -> set[str]:
        """Keys in use."""
        return {*self.facts, *self.scenes}

    def free_keys(self, rng: random.Random, count: int) -> list[str]:
        """Keys that nothing has yet."""
        return rng.sample([key for key in KEYS if key not in self.names], count)

    def append(self, tail: Mixed) -> None:
        """Another piece of the same dialogue, without pictures."""
        self.breaks.extend(len(self.ids) + place for place in tail.breaks)
        self.ids += tail.ids
        self.kinds += tail.kinds


def mixed_dialogue(
    rng: random.Random,
    length: int,
    pictures: int,
    facts: int,
    text_share: float = 0.3,
    held_out: bool = False,
) -> Mixed:
    """A training dialogue of exactly `length` tokens: pictures, statements, texts and questions in random order."""
    dialogue = Mixed()
    text_left = int(length * text_share)
    while True:
        done = len(dialogue.ids), len(dialogue.kinds), len(dialogue.breaks), len(dialogue.shown)
        draw = rng.random()
        if text_left > 8 and draw < 0.25:
            size = min(text_left, rng.randint(8, max(8, text_left)))
            text_left -= size
            dialogue.read(random_text(rng, size, held_out))
        elif len(dialogue.scenes) < pictures and (draw < 0.5 or not dialogue.names):
            (key,) = dialogue.free_keys(rng, 1)
            dialogue.show(key, random_scene(rng), groups=rng.choice(VIDEOS))
        elif len(dialogue.facts) < facts and draw < 0.62:
            count = rng.randint(1, min(facts - len(dialogue.facts), 4))
            dialogue.state({key: rng.choice(VALUES) for key in dialogue.free_keys(rng, count)})
        elif dialogue.facts and draw < 0.66:
            dialogue.state({rng.choice(list(dialogue.facts)): rng.choice(VALUES)}, update=True)
        elif dialogue.names:
            dialogue.ask_any(rng)
        else:
            text_left = 0 if pictures or facts else text_left
        if len(dialogue.ids) > length:
            ids, kinds, breaks, shown = done
            del dialogue.ids[ids:], dialogue.kinds[kinds:], dialogue.breaks[breaks:], dialogue.shown[shown:]
            if length > ids:
                dialogue.extend(encode("<|endoftext|>"))
                dialogue.extend(random_text(rng, length - ids - 1, held_out))
            return dialogue
