"""Conversations of `tiny-vl`: seeded, and every reply follows from what was shown or said before."""

import random
import re
import subprocess
import sys
from itertools import islice

import pytest

from trimkv_edge.models.tiny_vl import data
from trimkv_edge.models.tiny_vl.scenes import random_scene


def test_the_same_seed_gives_the_same_conversation() -> None:
    def said(seed: int) -> list[tuple[object, ...]]:
        return [
            (turn.text, turn.reply, turn.image and turn.image.tobytes())
            for turn in islice(data.rounds(seed, 2, 2, 4), 40)
        ]

    assert said(1) == said(1) != said(2)


def test_replies_follow_from_what_was_said() -> None:
    facts: dict[str, str] = {}
    shown: dict[str, dict[str, str]] = {}
    kinds = []
    for turn in islice(data.rounds(7, pictures=2, facts=3, questions=6), 400):
        kinds.append(turn.kind)
        if stated := re.fullmatch(r"Remember: the (\w+) is (\w+)\.", turn.text):
            facts[stated[1]] = stated[2]
            shown.pop(stated[1], None)
        elif turn.kind == "picture":
            assert turn.image is not None
            key = turn.text.removeprefix("Look at the ")
            facts.pop(key, None)
            shown[key] = {}
        elif turn.kind == "text question":
            key = turn.text.removeprefix("What is the ").removesuffix("?")
            assert turn.reply == f"The {key} is {facts[key]}."
        else:
            asked, key = re.fullmatch(r"(?:What )?(\w+) is the (\w+)\?", turn.text).groups()
            answer = re.fullmatch(rf"The {key} is (\w+)\.", turn.reply)[1]
            assert shown[key].setdefault(asked, answer) == answer
    assert {kind: kinds.count(kind) > 50 for kind in set(kinds)} == dict.fromkeys(
        ("picture", "fact", "picture question", "text question"), True
    )


def test_content_is_text_or_parts_with_the_picture_last() -> None:
    turn = data.show("lantern", random_scene(random.Random(0)))
    assert [part["type"] for part in turn.content] == ["text", "image"]
    assert turn.content[0]["text"] == "Look at the lantern"
    assert turn.content[1]["image"] is turn.image
    assert data.state({"gate": "lion", "tent": "owl"}).content == "Remember: the gate is lion; the tent is owl."


@pytest.mark.parametrize(("size", "asked"), [((32, 32), 3), ((32, 64), 4), ((64, 64), 4)])
def test_a_place_is_asked_only_where_there_are_several(size: tuple[int, int], asked: int) -> None:
    assert len(data.answers(random_scene(random.Random(1), size))) == asked


def test_pictures_and_conversations_need_no_torch() -> None:
    code = (
        "import sys; from trimkv_edge.models.tiny_vl.data import rounds; next(rounds(0, 1, 1, 1)); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
