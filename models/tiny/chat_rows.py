"""Training rows for `rg-chat`: `python -m trimkv_edge.models.tiny.chat_rows -o rows.jsonl` (see the README).

A row is several rounds: new facts and updates, texts with most of them left out, then a question about each fact. Over
a row far more values are said than a head may hold, and none is asked for after its round.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trimkv_edge.models.tiny import data
from trimkv_edge.models.tiny.train_rows import WEIGHTS, command
from trimkv_edge.models.tiny.words import VALUES

TEXT = (8, 48)  # tokens of a text


@dataclass(frozen=True)
class Gap:
    """Texts [start, end) of a row, after which `size` tokens of such texts are left out."""

    start: int
    end: int
    size: int


def chat_rows(seed: int, length: int, facts: int, longest: int) -> Iterator[dict[str, Any]]:
    """Conversations of `length` tokens as ready rows of `trimkv-train`.

    Most rounds leave out up to `longest` tokens of text before the questions, and one of each row as much as there are
    positions for after them: facts live as long as a round, not as long as the chat. A row can name one skip, so the
    capacity loss charges what the texts would still hold in one place only.
    """
    rng = random.Random(f"chat gates {seed}")
    while True:
        dialogue = data.Dialogue()
        inside, between = list[Gap](), list[Gap]()
        while len(dialogue.ids) < length:
            names = state(rng, dialogue, data.new_facts(rng, rng.randint(facts // 2, facts), dialogue.facts))
            inside.append(_gap(rng, dialogue, longest))
            for key in rng.sample(names, len(names)):
                dialogue.ask(key)
            between.append(_gap(rng, dialogue, 0))
        gaps = [gap for gap in inside if gap.end < length]
        room = data.MAX_POSITIONS - length - sum(gap.size for gap in gaps)
        idle = rng.choice([gap for gap in between if gap.end < length] or gaps[-1:])
        gaps.append(replace(idle, size=rng.randint(0, room)))
        charged = rng.choice(gaps)
        yield {
            "input_ids": dialogue.ids[:length],
            "index": [place + sum(gap.size for gap in gaps if place >= gap.end) for place in range(length)],
            "weight": [WEIGHTS.get(kind, 1.0) for kind in dialogue.kinds[:length]],
            "skip": [charged.start, charged.end, charged.end, charged.size],
        }


def state(rng: random.Random, dialogue: data.Dialogue, facts: dict[str, str]) -> list[str]:
    """States facts, four at once, and updates up to two of them; returns their keys."""
    names = list(facts)
    for first in range(0, len(names), 4):
        dialogue.state({key: facts[key] for key in names[first : first + 4]})
    for key in rng.sample(names, rng.randint(0, 2)):
        dialogue.state({key: rng.choice(VALUES)}, update=True)
    return names


def _gap(rng: random.Random, dialogue: data.Dialogue, longest: int) -> Gap:
    """Reads a text or two; in three of four rounds some are left out."""
    start = len(dialogue.ids)
    for _ in range(rng.randint(1, 2)):
        dialogue.read(data.random_text(rng, rng.randint(*TEXT)))
    return Gap(start, len(dialogue.ids), rng.randint(0, longest) if rng.random() < 0.75 else 0)


def main() -> None:
    """Command line entry."""
    command(chat_rows, __doc__, 1024, 16_000)


if __name__ == "__main__":
    main()
