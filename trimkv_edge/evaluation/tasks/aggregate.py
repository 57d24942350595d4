"""Tracing and counting over the whole stream (RULER, arXiv 2404.06654: VT, CWE, FWE, in chat form)."""

from __future__ import annotations

import random

from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import WordList
from trimkv_edge.evaluation.tasks.base import Task


def _variables(rng: random.Random, words: WordList) -> Conversation:
    conversation = Conversation()
    chains = [(rng.choice(words.values), rng.sample(list(words.keys), 3)) for _ in range(2)]
    for step in range(3):
        for value, names in chains:
            before = value if step == 0 else f"the {names[step - 1]}"
            conversation.say(f"Remember: the {names[step]} is {before}.", "Noted.")
        conversation.read()
    value, names = rng.choice(chains)
    conversation.ask(f"Follow the chain: what is the {names[-1]} in the end?", f"The {names[-1]} is ", value)
    return conversation


def _count(rng: random.Random, words: WordList, often: list[int], rare: int) -> tuple[Conversation, list[str]]:
    """Lists of words, cut into four messages: some ``often`` times, six others ``rare`` times each."""
    chosen = rng.sample(list(words.values), len(often) + 6)
    bag = [word for word, times in zip(chosen, [*often, *[rare] * 6], strict=True) for _ in range(times)]
    rng.shuffle(bag)
    conversation = Conversation()
    for part in range(4):
        conversation.say("Count these words: " + ", ".join(bag[part::4]) + ".", "Noted.")
        conversation.read()
    return conversation, chosen[: len(often)]


def _frequent(rng: random.Random, words: WordList) -> Conversation:
    conversation, (top,) = _count(rng, words, [12], 3)
    conversation.ask("Which word came most often?", "The word is ", top)
    return conversation


def _common(rng: random.Random, words: WordList) -> Conversation:
    conversation, top = _count(rng, words, [12, 10, 8], 2)
    conversation.ask("Which three words came most often, most frequent first?", "The words are ", ", ".join(top))
    return conversation


VARIABLES = Task("variables", "two chains of three variables, the end of one asked for", _variables, "RULER, VT")
FREQUENT_WORDS = Task("frequent-words", "the most frequent word of a list", _frequent, "RULER, FWE")
COMMON_WORDS = Task("common-words", "the three most common words of a list", _common, "RULER, CWE")
