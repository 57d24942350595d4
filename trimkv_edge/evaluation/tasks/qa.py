"""Questions about generated prose: people, where they live and what they carry."""

from __future__ import annotations

import random

from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import WordList
from trimkv_edge.evaluation.tasks.base import Task

_NAMES = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Henry",
    "Irene",
    "Jonas",
    "Karin",
    "Louis",
    "Maria",
    "Nils",
    "Olga",
    "Peter",
    "Rosa",
    "Simon",
]


def _people(rng: random.Random, words: WordList) -> Conversation:
    names = rng.sample(_NAMES, 4)
    places, things = rng.sample(list(words.keys), 4), rng.sample(list(words.values), 4)
    conversation = Conversation()
    for name, place, thing in zip(names, places, things, strict=True):
        conversation.say(f"{name} lives near the {place} and always carries a {thing}.", "Noted.")
    conversation.read()
    for who in rng.sample(range(4), 2):
        name = names[who]
        conversation.ask(f"Where does {name} live?", f"{name} lives near the ", places[who], "place")
        conversation.ask(f"What does {name} carry?", f"{name} carries a ", things[who], "thing")
    return conversation


QA = Task("qa", "4 people described in prose, 4 questions", _people, "RULER, QA (with generated facts)")
