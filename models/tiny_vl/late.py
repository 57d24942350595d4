"""Dialogues with pictures and facts early, other things after, and questions late."""

import random

from trimkv_edge.models.tiny.data import ORDINARY
from trimkv_edge.models.tiny.words import VALUES
from trimkv_edge.models.tiny_vl.corpus import random_text
from trimkv_edge.models.tiny_vl.data import answers
from trimkv_edge.models.tiny_vl.dialogues import VIDEOS, Mixed
from trimkv_edge.models.tiny_vl.scenes import random_scene

LONGEST_ITEM = 80  # tokens of a text, a picture or a fact with its message


def late_dialogue(
    rng: random.Random,
    length: int,
    pictures: int,
    facts: int,
    questions: int,
    others: int = 0,
    held_out: bool = False,
) -> Mixed:
    """A dialogue of exactly `length` tokens.

    `pictures` and `facts` in random order, then a long text (with `others` more pictures in it, which nobody asks
    about), then `questions`, about pictures and facts in turn.
    """
    dialogue = Mixed()
    names = dialogue.free_keys(rng, pictures + facts + others)
    first = names[: pictures + facts]
    seen, told = first[:pictures], first[pictures:]
    rng.shuffle(first)
    for key in first:
        if key in seen:
            dialogue.show(key, random_scene(rng), groups=rng.choice(VIDEOS))
        else:
            dialogue.state({key: rng.choice(VALUES)})
    asked = [(key, name) for key in seen for name in answers(dialogue.scenes[key])]
    rng.shuffle(asked)
    rng.shuffle(told)
    tail = Mixed(facts=dialogue.facts, scenes=dialogue.scenes)
    for number in range(questions):
        if asked and (number % 2 == 0 or not told):
            tail.ask_about(*asked.pop())
        elif told:
            tail.ask(told.pop())
    between = [(key, random_scene(rng)) for key in names[pictures + facts :]]
    frames = Mixed()
    for key, scene in between:
        frames.show(key, scene)
    for _ in range(others + 1):
        frames.read([])
    left = length - len(dialogue.ids) - len(frames.ids) - len(tail.ids)
    if left < 0:
        raise ValueError(f"{length} tokens are too few for {pictures} pictures, {facts} facts, {questions} questions")
    for number, (key, scene) in enumerate(between):
        size = int(left / (others + 1 - number) * rng.uniform(0.5, 1.5))
        left -= size
        dialogue.read(random_text(rng, size, held_out))
        dialogue.show(key, scene)
    dialogue.read(random_text(rng, left, held_out))
    dialogue.append(tail)
    return dialogue


def crowded_dialogue(
    rng: random.Random, length: int, questions: int, held_out: bool = False
) -> tuple[Mixed, tuple[int, int, int]]:
    """A dialogue of exactly `length` tokens in which pictures, facts and texts go on after those that are asked for.

    With it (start, resume, end): the stretch that goes on, and the beginning of its last text.
    """
    dialogue = Mixed()

    def say(count: int) -> list[str]:
        names = dialogue.free_keys(rng, count)
        for key in names:
            if rng.random() < 0.5:
                dialogue.show(key, random_scene(rng), groups=rng.choice(VIDEOS))
            else:
                dialogue.state({key: rng.choice(VALUES)})
        return names

    asked = say(rng.randint(questions, questions + 2))
    tail = Mixed(facts=dialogue.facts, scenes=dialogue.scenes)
    for key in rng.sample(asked, questions):
        if key in tail.scenes:
            tail.ask_about(key, rng.choice(answers(tail.scenes[key])))
        else:
            tail.ask(key)
    start = len(dialogue.ids)
    for _ in range(rng.randint(2, 4)):
        if length - len(dialogue.ids) - len(tail.ids) > 2 * LONGEST_ITEM + 40:
            dialogue.read(random_text(rng, rng.randint(16, 40), held_out))
            say(1)
    frame = Mixed()
    frame.read([])
    dialogue.read(random_text(rng, length - len(dialogue.ids) - len(frame.ids) - len(tail.ids), held_out))
    resume, _, end = dialogue.text
    dialogue.append(tail)
    return dialogue, (start, resume, end)


def rounds_dialogue(rng: random.Random, length: int, held_out: bool = False) -> tuple[Mixed, list[tuple[int, int]]]:
    """A conversation of exactly `length` tokens in rounds, and the places [start, end) of its texts.

    In a round: two to four pictures and as many facts, a text, a question about each. Nothing is asked after its round.
    """
    dialogue, texts = Mixed(), []
    while len(dialogue.ids) < length:
        names = dialogue.free_keys(rng, rng.randint(4, 8))
        for number, key in enumerate(names):
            if number % 2:
                dialogue.state({key: rng.choice(VALUES)})
            else:
                dialogue.show(key, random_scene(rng))
        dialogue.read(random_text(rng, rng.randint(16, 64), held_out))
        texts.append((dialogue.text[0], dialogue.text[2]))
        for key in rng.sample(names, len(names)):
            if key in dialogue.scenes:
                dialogue.ask_about(key, rng.choice(answers(dialogue.scenes[key])))
            else:
                dialogue.ask(key)
    # A picture that does not end in time is left out with all behind it.
    whole = [shown for shown in dialogue.shown if shown.start + shown.height * shown.width <= length]
    end = min([length, *(shown.start for shown in dialogue.shown[len(whole) :])])
    ids, kinds = dialogue.ids[:end], dialogue.kinds[:end]
    row = Mixed(ids + random_text(rng, length - end, held_out), kinds + [ORDINARY] * (length - end), shown=whole)
    return row, [(start, stop) for start, stop in texts if stop < end]
