"""Long-memory dialogues in the chat format, for training and evaluation: facts early, text after, questions late.

A fact is `the <key> is <value>`; an update states a key again, and from then on only its new value counts.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from trimkv_edge.models.tiny.corpus import stdlib_texts
from trimkv_edge.models.tiny.tokenizer import load_tokenizer
from trimkv_edge.models.tiny.words import KEYS, VALUES

MAX_POSITIONS = 131072
# Kinds of tokens: predictable by language, not at all, by recall (a value asked for), by copying (the key just asked).
ORDINARY, RANDOM, ANSWER, ECHO = 0, 1, 2, 3


@lru_cache(maxsize=4096)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a short fixed phrase (long texts have their own cache)."""
    return tuple(load_tokenizer().encode(text).ids)


@lru_cache(maxsize=2)
def text_ids(held_out: bool = False) -> tuple[tuple[int, ...], ...]:
    """Token ids of each standard-library file."""
    return tuple(tuple(e.ids) for e in load_tokenizer().encode_batch(list(stdlib_texts(held_out))))


@dataclass
class Dialogue:
    """Token ids with the kind of each, and where a stretch of the stream may have been skipped (indices into `ids`).

    `text` is (start, middle, end) of the last piece of real text.
    """

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    text: tuple[int, int, int] = (0, 0, 0)

    def add(self, text: str, kind: int = ORDINARY) -> None:
        """Append a phrase that begins at a pre-token boundary, so that piecewise and whole encodings agree."""
        self.extend(encode(text), kind)

    def extend(self, ids: "tuple[int, ...] | list[int]", kind: int = ORDINARY) -> None:
        """Append ready token ids."""
        self.ids.extend(ids)
        self.kinds.extend([kind] * len(ids))

    def state(self, facts: dict[str, str], update: bool = False) -> None:
        """A user message that states `facts`, and the reply to it."""
        self.breaks.append(len(self.ids))
        self.add("<|im_start|>user\n")
        self.add("Update:" if update else "Remember:")
        for number, (key, value) in enumerate(facts.items()):
            self.add(" the" if number == 0 else "; the")
            self.add(" " + key, RANDOM)
            self.add(" is")
            self.add(" " + value, RANDOM)
        self.add(".<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n")
        self.facts.update(facts)

    def ask(self, key: str) -> None:
        """A question about `key` and its answer, the newest stated value."""
        self.breaks.append(len(self.ids))
        self.add("<|im_start|>user\nWhat is the")
        self.add(" " + key, RANDOM)
        self.add("?<|im_end|>\n<|im_start|>assistant\nThe")
        self.add(" " + key, ECHO)
        self.add(" is")
        self.add(" " + self.facts[key], ANSWER)
        self.add(".<|im_end|>\n")

    def read(self, ids: "tuple[int, ...] | list[int]") -> None:
        """A user message that holds a piece of real text, which nobody will ask about."""
        self.breaks.append(len(self.ids))
        self.add("<|im_start|>user\nRead this:\n")
        start, middle, end = len(self.ids), len(self.ids) + len(ids) // 2, len(self.ids) + len(ids)
        self.text = (start, middle, end)
        self.extend(ids)
        self.breaks += [middle, end]
        self.add("<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n")


def random_text(rng: random.Random, length: int, held_out: bool = False) -> list[int]:
    """`length` token ids from a random place of the standard library (files joined by the end-of-text token)."""
    return piece(rng, text_ids(held_out), length, encode("<|endoftext|>")[0])


def piece(rng: random.Random, files: "tuple[tuple[int, ...], ...]", length: int, end: int) -> list[int]:
    """`length` token ids from a random place of `files`, which are joined by the token `end`."""
    out: list[int] = []
    while len(out) < length:
        ids = files[rng.randrange(len(files))]
        if not ids:
            continue
        start = rng.randrange(len(ids)) if not out else 0
        out.extend(ids[start : start + length - len(out)])
        if len(out) < length:
            out.append(end)
    return out


def new_facts(rng: random.Random, count: int, known: "dict[str, str] | None" = None) -> dict[str, str]:
    """`count` facts whose keys are not in `known`, with any values."""
    free = [key for key in KEYS if key not in (known or {})]
    return {key: rng.choice(VALUES) for key in rng.sample(free, count)}


def drill(rng: random.Random, length: int, keys: int) -> Dialogue:
    """First lesson: bare statements `the <key> is <value>;` over few keys, in random order, so most are repetitions."""
    dialogue = Dialogue()
    facts = new_facts(rng, keys)
    names = list(facts)
    while len(dialogue.ids) < length:
        key = rng.choice(names)
        kind = ANSWER if key in dialogue.facts else RANDOM
        dialogue.breaks.append(len(dialogue.ids))
        dialogue.add(" the")
        dialogue.add(" " + key, RANDOM)
        dialogue.add(" is")
        dialogue.add(" " + facts[key], kind)
        dialogue.add(";")
        dialogue.facts[key] = facts[key]
    return dialogue


def mixed_dialogue(
    rng: random.Random, length: int, facts: int, text_share: float = 0.4, held_out: bool = False
) -> Dialogue:
    """A training dialogue of at least `length` tokens: statements, text and questions in random order."""
    dialogue = Dialogue()
    first = rng.randint(1, max(1, min(facts, 4)))
    dialogue.state(new_facts(rng, first))
    text_left = int(length * text_share)
    while len(dialogue.ids) < length:
        room = facts - len(dialogue.facts)
        draw = rng.random()
        if text_left > 8 and draw < 0.35:
            size = min(text_left, rng.randint(8, max(8, text_left)))
            text_left -= size
            dialogue.read(random_text(rng, size, held_out))
        elif room > 0 and draw < 0.55:
            dialogue.state(new_facts(rng, rng.randint(1, min(room, 4)), dialogue.facts))
        elif draw < 0.66:
            dialogue.state({rng.choice(list(dialogue.facts)): rng.choice(VALUES)}, update=True)
        else:
            dialogue.ask(rng.choice(list(dialogue.facts)))
    return dialogue


def late_dialogue(
    rng: random.Random, length: int, facts: int, questions: int, updates: int = 0, held_out: bool = False
) -> Dialogue:
    """An evaluation dialogue of exactly `length` tokens: facts (and updates of some), one long text, then questions."""
    dialogue = Dialogue()
    stated = new_facts(rng, facts)
    names = list(stated)
    for start in range(0, facts, 4):
        dialogue.state({key: stated[key] for key in names[start : start + 4]})
    for key in rng.sample(names, updates):
        dialogue.state({key: rng.choice(VALUES)}, update=True)
    tail = Dialogue(facts=dialogue.facts)
    for key in rng.sample(names, questions):
        tail.ask(key)
    frame = Dialogue()
    frame.read([])
    size = length - len(dialogue.ids) - len(frame.ids) - len(tail.ids)
    if size < 0:
        raise ValueError(f"{length} tokens are too few for {facts} facts and {questions} questions")
    dialogue.read(random_text(rng, size, held_out))
    dialogue.breaks.extend(len(dialogue.ids) + b for b in tail.breaks)
    dialogue.ids += tail.ids
    dialogue.kinds += tail.kinds
    return dialogue


def jumping_positions(rng: random.Random, breaks: list[int], length: int, span: int) -> list[int]:
    """`length` increasing positions below `span` that jump only at some of `breaks` (PoSE, arXiv 2309.10400)."""
    chosen = sorted(set(rng.sample(breaks, min(len(breaks), rng.randint(1, 3))))) if breaks else []
    spare = span - length
    cuts = sorted(rng.randint(0, spare) for _ in range(len(chosen) + 1))
    positions, offset, at = [], cuts[0], 0
    for index in range(length):
        while at < len(chosen) and chosen[at] <= index:
            at += 1
            offset = cuts[at]
        positions.append(offset + index)
    return positions


def to_batch(
    rng: random.Random, dialogues: list[Dialogue], length: int, jump_share: float, span: int = MAX_POSITIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, kinds and positions, each [batch, length] int64; shorter dialogues are refused, longer ones cut.

    A `jump_share` of the rows gets jumping positions inside a random span, log-uniform between `length` and `span`.
    """
    ids, kinds, positions = [], [], []
    for dialogue in dialogues:
        if len(dialogue.ids) < length:
            raise ValueError(f"a dialogue of {len(dialogue.ids)} tokens cannot fill a row of {length}")
        ids.append(dialogue.ids[:length])
        kinds.append(dialogue.kinds[:length])
        if rng.random() < jump_share:
            wide = int(length * (span / length) ** rng.random())
            inner = [b for b in dialogue.breaks if 0 < b < length]
            positions.append(jumping_positions(rng, inner, length, max(wide, length)))
        else:
            positions.append(list(range(length)))
    return torch.tensor(ids), torch.tensor(kinds), torch.tensor(positions)
