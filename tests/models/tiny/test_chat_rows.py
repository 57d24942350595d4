"""Training rows of conversations: places jump only behind texts, and every question is about its own round."""

import itertools
import json
import re
import sys

import pytest

from trimkv_edge.models.tiny import chat_rows, data
from trimkv_edge.models.tiny.tokenizer import load_tokenizer
from trimkv_edge.training.records import local_records

LENGTH, LONGEST = 640, 5_000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(itertools.islice(chat_rows.chat_rows(3, LENGTH, facts=6, longest=LONGEST), 12))


def text_of(ids: list[int]) -> str:
    return load_tokenizer().decode(ids, skip_special_tokens=False)


def jumps(row: dict) -> dict[int, int]:
    """Tokens left out before each row place, where any were."""
    pairs = enumerate(itertools.pairwise(row["index"]), 1)
    return {place: after - before - 1 for place, (before, after) in pairs if after - before != 1}


def test_a_seed_gives_the_same_rows(rows: list[dict]) -> None:
    assert list(itertools.islice(chat_rows.chat_rows(3, LENGTH, 6, LONGEST), 3)) == rows[:3]
    assert next(chat_rows.chat_rows(4, LENGTH, 6, LONGEST)) != rows[0]


def test_texts_are_left_out_only_behind_texts_and_within_the_positions(rows: list[dict]) -> None:
    for row in rows:
        assert len(row["input_ids"]) == len(row["index"]) == len(row["weight"]) == LENGTH
        assert row["index"][0] == 0
        assert row["index"][-1] < data.MAX_POSITIONS
        for place, left_out in jumps(row).items():
            assert left_out > 0
            head = text_of(row["input_ids"][:place])
            assert head.endswith("<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n")
            assert "Read this:\n" in head[head.rindex("<|im_start|>user\n") :]
        assert sum(left_out > LONGEST for left_out in jumps(row).values()) <= 1
    assert sum(max(jumps(row).values(), default=0) > LONGEST for row in rows) > len(rows) // 2


def test_the_skip_names_one_of_the_texts_that_stand_for_what_is_left_out(rows: list[dict]) -> None:
    for row in rows:
        start, end, resume, left_out = row["skip"]
        assert jumps(row).get(resume, 0) == left_out
        assert end == resume
        texts = text_of(row["input_ids"][start:end])
        assert texts.startswith("<|im_start|>user\nRead this:\n")
        assert texts.endswith("Noted.<|im_end|>\n")
        assert "What is the" not in texts


def test_answers_are_the_newest_values_of_the_round_and_weigh_most(rows: list[dict]) -> None:
    for row in rows:
        newest, answers = dict[str, str](), 0
        text = text_of(row["input_ids"])
        texts_removed = re.sub(r"(?s)Read this:\n.*?<\|im_end\|>\n<\|im_start\|>assistant\nNoted\.", "", text)
        for article, key, value in re.findall(r"([tT])he (\w+) is (\w+)", texts_removed):
            if article == "t":
                newest[key] = value
            else:
                assert newest.pop(key) == value  # asked once
                answers += 1
        assert answers > 6
        heavy = [token for token, weight in zip(row["input_ids"], row["weight"], strict=True) if weight == 20]
        # The last answer may be cut off before or behind its value, or be one whose sentence has no end.
        assert answers - 1 <= len(heavy) <= answers + 1


def test_the_command_writes_what_the_training_reads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["chat_rows", "-o", str(out), "--rows", "2", "--length", "400", "--seed", "9"])
    chat_rows.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == list(itertools.islice(chat_rows.chat_rows(9, 400, 8, 16_000), 2))
    assert [list(record.value.ids) for record in local_records(out)] == [line["input_ids"] for line in lines]
    assert list(tmp_path.iterdir()) == [out]
