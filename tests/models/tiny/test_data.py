"""The dialogues of `tiny`: seeded, exact in length, and asking for the newest value."""

import itertools
import random
import re

import pytest

from trimkv_edge.models.tiny import data
from trimkv_edge.models.tiny.tokenizer import load_tokenizer
from trimkv_edge.models.tiny.words import KEYS, VALUES


def text_of(ids: list[int]) -> str:
    return load_tokenizer().decode(ids, skip_special_tokens=False)


def test_words_are_distinct_and_one_token_each() -> None:
    words = KEYS + VALUES
    assert len(set(words)) == len(words)
    assert all(len(data.encode(" " + word)) == 1 for word in words)


def test_the_same_seed_gives_the_same_batch() -> None:
    def batch(seed: int):
        rng = random.Random(seed)
        dialogues = [data.mixed_dialogue(rng, 128, 4, held_out=True), data.late_dialogue(rng, 200, 3, 2, held_out=True)]
        return data.to_batch(rng, dialogues, 128, jump_share=0.5)

    first, again, other = batch(1), batch(1), batch(2)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_newest_value_is_the_answer(seed: int) -> None:
    dialogue = data.mixed_dialogue(random.Random(seed), 400, 6, text_share=0.0)
    newest: dict[str, str] = {}
    asked = 0
    for statement in re.finditer(r"([tT])he (\w+) is (\w+)", text_of(dialogue.ids)):
        kind, key, value = statement.groups()
        if kind == "t" and value in VALUES:
            newest[key] = value
        elif kind == "T":
            assert newest[key] == value
            asked += 1
    assert asked == sum(k == data.ANSWER for k in dialogue.kinds) > 5


def test_an_update_replaces_the_value() -> None:
    dialogue = data.Dialogue()
    dialogue.state({"anchor": "tiger"})
    dialogue.state({"anchor": "zebra"}, update=True)
    dialogue.ask("anchor")
    assert text_of(dialogue.ids).endswith("The anchor is zebra.<|im_end|>\n")


def test_piecewise_encoding_is_the_tokenizers_own() -> None:
    dialogue = data.mixed_dialogue(random.Random(3), 300, 6, text_share=0.0)
    assert load_tokenizer().encode(text_of(dialogue.ids)).ids == dialogue.ids


def test_late_dialogue_has_the_length_asked_for() -> None:
    dialogue = data.late_dialogue(random.Random(0), 512, 8, 8, updates=2, held_out=True)
    assert len(dialogue.ids) == len(dialogue.kinds) == 512
    start, _, end = dialogue.text
    assert data.ANSWER not in dialogue.kinds[:end]
    assert dialogue.kinds.count(data.ANSWER) == 8
    assert end - start > 100
    with pytest.raises(ValueError, match="too few"):
        data.late_dialogue(random.Random(0), 64, 8, 8)


def test_positions_jump_only_at_breaks_and_stay_in_the_span() -> None:
    rng = random.Random(5)
    for _ in range(50):
        positions = data.jumping_positions(rng, [10, 20, 40], 64, 131072)
        steps = [b - a for a, b in itertools.pairwise(positions)]
        assert positions[0] >= 0
        assert positions[-1] < 131072
        assert min(steps) >= 1
        assert {i + 1 for i, step in enumerate(steps) if step > 1} <= {10, 20, 40}


def test_held_out_files_are_not_training_files() -> None:
    from trimkv_edge.models.tiny.corpus import stdlib_texts

    train, held_out = set(stdlib_texts()), set(stdlib_texts(held_out=True))
    assert train
    assert held_out
    assert len(train & held_out) <= 1
