"""How the benchmark of long conversations judges answers and what it says."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from conversation import FACTS, ROUNDS, Talk, keys_of_rounds, verdict

from trimkv_edge.runtime.session import Piece


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        ("The gate is owl.", ["owl"], "right"),
        ("The gate is owl.\n", ["lion", "owl"], "right"),
        ("The gate is lion.", ["lion", "owl"], "older"),
        ("The gate is owl.", ["owl", "lion", "owl"], "right"),
        ("The gate is owl", ["owl"], "other"),  # the end is missing
        ("The fence is owl.", ["owl"], "other"),
        ("The gate is zebra.", ["lion", "owl"], "other"),
        ("The gate is gate.", ["lion"], "none"),
        ("Noted.", ["lion"], "none"),
        ("", ["lion"], "none"),
    ],
)
def test_verdict(answer: str, said: list[str], expected: str) -> None:
    assert verdict(answer, "gate", said) == expected


def test_no_key_is_used_twice() -> None:
    rounds = keys_of_rounds(random.Random(0), ROUNDS)
    names = [key for keys in rounds for key in keys]
    assert [len(keys) for keys in rounds] == [FACTS] * 12
    assert len(set(names)) == 96


class Listener:
    """Answers as one that remembers all, except what it is told to get wrong."""

    def __init__(self, wrong: str = "") -> None:
        self.facts: dict[str, str] = {}
        self.heard: list[str] = []
        self.wrong = wrong

    def ask(self, text: str, count: int) -> Iterator[Piece]:
        self.heard.append(text)
        word, _, rest = text.partition(": ")
        if word in ("Remember", "Update"):
            for fact in rest.removesuffix(".").split("; "):
                _, key, _, value = fact.split()
                self.facts[key] = value
            yield Piece(0, "Noted.")
        elif text.startswith("What is the "):
            key = text.removesuffix("?").split()[-1]
            yield Piece(0, f"The {key} ")
            yield Piece(0, "is nothing." if key == self.wrong else f"is {self.facts[key]}.")


def test_a_round_states_updates_reads_and_asks() -> None:
    keys = ["gate", "fence", "sofa", "well", "oven", "mirror", "vase", "wagon"]
    listener = Listener(wrong="sofa")
    talk = Talk(listener, random.Random(3))  # type: ignore[arg-type]
    talk.round(keys, ["one", "two"])
    talk.round(keys, [])
    words = [text.split(":")[0].split(" ")[0] for text in listener.heard]
    assert words == [*["Remember"] * 2, *["Update"] * 2, "Read", "Read", *["What"] * 8, *["Update"] * 10, *["What"] * 8]
    asked = [text.removesuffix("?").split()[-1] for text in listener.heard if text.startswith("What")]
    assert sorted(asked[:8]) == sorted(asked[8:]) == sorted(keys)
    assert talk.right == [7, 7]
    assert talk.verdicts == {"right": 14, "none": 2}
    assert {kind: len(seconds) for kind, seconds in talk.seconds.items()} == {"state": 14, "read": 2, "ask": 16}
