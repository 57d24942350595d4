"""What is read: lengths, seeds, and that nothing is both calibrated and checked on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from trimkv_edge.calibration.streams import StreamPlan, Streams, sample_streams, text_streams
from trimkv_edge.errors import ConfigError
from trimkv_edge.models.source import TINY, ModelSource, find_source


@pytest.fixture(scope="module")
def tiny() -> ModelSource:
    return find_source("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "weights" / "tokenizer.json"))


def shared(streams: Streams, width: int) -> set[tuple[int, ...]]:
    """Runs of ``width`` tokens that both parts have."""
    runs = [
        {tuple(ids[i : i + width]) for ids in part for i in range(len(ids) - width + 1)}
        for part in (streams.calibration, streams.held_out)
    ]
    return runs[0] & runs[1]


def test_sample(tiny: ModelSource, tokenizer: Tokenizer) -> None:
    plan = StreamPlan(700, 6, 4, 3)
    streams = sample_streams(tiny, plan)
    assert [len(ids) for ids in streams.calibration] == [700] * 6
    assert [len(ids) for ids in streams.held_out] == [700] * 4
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in streams.calibration]
    assert ["<|im_start|>user" in text for text in texts] == [True, False] * 3
    # Questions are worded alike; a stretch of 60 tokens would be text of one file in both.
    assert not shared(streams, 60)
    assert sample_streams(tiny, plan) == streams
    assert sample_streams(tiny, StreamPlan(700, 6, 4, 4)).calibration != streams.calibration


def test_too_short_for_a_conversation(tiny: ModelSource) -> None:
    with pytest.raises(ConfigError, match="a stream of 60 tokens cannot hold the task"):
        sample_streams(tiny, StreamPlan(60))


def test_random_tokens_without_a_tokenizer() -> None:
    streams = sample_streams(find_source("qwen3-0.6b", None, True), StreamPlan(50, 3, 2, 1))
    every = streams.calibration + streams.held_out
    assert [len(ids) for ids in every] == [50] * 5
    assert len({tuple(ids) for ids in every}) == 5
    assert all(0 <= token < 151936 for ids in every for token in ids)
    assert streams.text == "random tokens (seed 1)"


def test_text_is_cut_without_overlap_and_its_end_is_held_out(
    tiny: ModelSource, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = " ".join(f"Number {number} is not {number * 7}." for number in range(400))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    path = tmp_path / "words.txt"
    path.write_text(text)
    length = len(ids) // 7
    streams = text_streams(tiny, [path], StreamPlan(length, 4, 2))
    assert streams.text == "words.txt"

    def place(stream: list[int]) -> int:
        found = [start for start in range(len(ids) - length + 1) if ids[start : start + length] == stream]
        assert len(found) == 1, "every number occurs once, so a stretch of the text has one place"
        return found[0]

    starts = [place(stream) for stream in streams.calibration + streams.held_out]
    assert all(after - before >= length for before, after in pairwise(starts))
    assert len(streams.calibration) == 4
    assert starts[0] == 0
    assert starts[4] >= len(ids) * 2 // 3
    assert text_streams(tiny, [path], StreamPlan(len(ids) // 6, 4, 2)).calibration[0] == ids[: len(ids) // 6]
    with pytest.raises(
        ConfigError, match=rf"the text has {len(ids)} tokens, but 4 \+ 2 held-out streams of {length * 2}"
    ):
        text_streams(tiny, [path], StreamPlan(length * 2, 4, 2))


def test_chats_texts_and_rows_of_a_json_lines_file(tiny: ModelSource, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "The code of the cat is 7."}, {"role": "assistant", "content": "Noted."}]
    lines = [{"messages": chat}, {"text": "A plain line of text."}, {"input_ids": [5, 6, 7]}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    streams = text_streams(tiny, [path], StreamPlan(9, 2, 1))
    assert tokenizer.decode(streams.calibration[0], skip_special_tokens=False).startswith("<|im_start|>user\nThe code")
    assert streams.held_out[0]
    path.write_text(json.dumps({"input_ids": [1, 10**6]}) + "\n")
    with pytest.raises(ConfigError, match=r"mixed\.jsonl:1 has token ids outside the"):
        text_streams(tiny, [path], StreamPlan(2, 1, 1))


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text needs a tokenizer, and qwen3-0\.6b has none"):
        text_streams(find_source("qwen3-0.6b", None, True), [tmp_path], StreamPlan(9))


@pytest.mark.parametrize("given", [{"length": 1}, {"count": 0}, {"held_out": 0}, {"seed": -1}])
def test_plans_out_of_range(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="of streams is"):
        StreamPlan(**{"length": 100, **given})
