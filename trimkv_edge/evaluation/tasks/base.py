"""What a task is: a function that writes one conversation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import Sample, SampleWriter, WordList


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        name: as on the command line.
        asks: one line for ``--help`` and reports.
        write: makes one conversation from a seeded generator and a word list; None for plain text.
        source: where the task comes from.
    """

    name: str
    asks: str
    write: Callable[[random.Random, WordList], Conversation] | None
    source: str = ""

    @property
    def unit(self) -> str:
        """``accuracy``, or ``nats`` per token for plain text."""
        return "nats" if self.write is None else "accuracy"

    def sample(self, writer: SampleWriter, length: int, seed: int, number: int) -> Sample:
        """Stream ``number`` of ``length`` tokens; the same for every method."""
        rng = random.Random(f"{self.name} {length} {seed} {number}")
        if self.write is None:
            return writer.text(rng, length)
        return writer.conversation(rng, self.write(rng, writer.words), length)


def draw_facts(rng: random.Random, words: WordList, count: int) -> dict[str, str]:
    """``count`` distinct keys with any values."""
    return {key: rng.choice(words.values) for key in rng.sample(list(words.keys), count)}


def tell_in_fours(conversation: Conversation, facts: dict[str, str]) -> None:
    """States facts, four to a message."""
    items = list(facts.items())
    for start in range(0, len(items), 4):
        conversation.tell(dict(items[start : start + 4]))
