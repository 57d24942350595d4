"""Needles: facts stated early, text, then questions (RULER, arXiv 2404.06654, the NIAH family, in chat form)."""

from __future__ import annotations

import random

from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import WordList
from trimkv_edge.evaluation.tasks.base import Task, draw_facts, tell_in_fours

_SOURCE = "RULER, needle in a haystack"


def _needles(rng: random.Random, words: WordList, facts: int, questions: int) -> Conversation:
    stated = draw_facts(rng, words, facts)
    conversation = Conversation()
    tell_in_fours(conversation, stated)
    conversation.read()
    for key in rng.sample(list(stated), questions):
        conversation.recall(key, stated[key])
    return conversation


def _values(rng: random.Random, words: WordList) -> Conversation:
    key, values = rng.choice(list(words.keys)), rng.sample(list(words.values), 4)
    conversation = Conversation()
    for value in values:
        conversation.tell({key: value})
    conversation.read()
    conversation.ask(f"What are all values of the {key}, in order?", f"The {key} is ", ", ".join(values))
    return conversation


SINGLE = Task("single", "one fact, one question", lambda rng, words: _needles(rng, words, 1, 1), _SOURCE)
MULTI_KEY = Task("multi-key", "24 facts, 4 of them asked for", lambda rng, words: _needles(rng, words, 24, 4), _SOURCE)
MULTI_QUERY = Task("multi-query", "8 facts, all asked for", lambda rng, words: _needles(rng, words, 8, 8), _SOURCE)
MULTI_VALUE = Task("multi-value", "one key with four values, all asked for", _values, _SOURCE)
