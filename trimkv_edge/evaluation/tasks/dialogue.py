"""Long conversations: facts that change, and questions spread over the stream."""

from __future__ import annotations

import random

from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import WordList
from trimkv_edge.evaluation.tasks.base import Task, draw_facts, tell_in_fours


def _updates(rng: random.Random, words: WordList) -> Conversation:
    facts = draw_facts(rng, words, 8)
    changed = rng.sample(list(facts), 3)
    conversation = Conversation()
    tell_in_fours(conversation, facts)
    for key in changed:
        conversation.read()
        facts[key] = rng.choice([value for value in words.values if value != facts[key]])
        conversation.tell({key: facts[key]}, update=True)
    conversation.read()
    for key in rng.sample(list(facts), len(facts)):
        conversation.recall(key, facts[key], "updated" if key in changed else "first value")
    return conversation


def _dialogue(rng: random.Random, words: WordList) -> Conversation:
    facts = draw_facts(rng, words, 12)
    keys = list(facts)
    conversation = Conversation()
    for turn in range(4):
        conversation.tell({key: facts[key] for key in keys[3 * turn : 3 * turn + 3]})
        conversation.read()
        for key in rng.sample(keys[: 3 * turn + 3], 3):
            conversation.recall(key, facts[key], "same turn" if key in keys[3 * turn :] else "earlier turn")
    return conversation


UPDATES = Task("updates", "8 facts, 3 of them change between texts, all asked for", _updates)
DIALOGUE = Task("dialogue", "4 turns: 3 facts, text, 3 questions about any fact so far", _dialogue)
