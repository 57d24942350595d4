"""Streams of tasks: their length, where answers lie, and the wording that the shipped model was trained on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.evaluation.conversation import Conversation
from trimkv_edge.evaluation.samples import SampleWriter
from trimkv_edge.evaluation.tasks import TASKS
from trimkv_edge.evaluation.words import WORDS
from trimkv_edge.models.source import TINY

FOLDER = TINY / "weights"
TEXTS = ["def f(x):\n    return x + 1\n" * 40, "", "import os\nprint(os.name)\n" * 40]
ASKED = {
    "single": 1,
    "multi-key": 4,
    "multi-query": 8,
    "multi-value": 1,
    "updates": 8,
    "dialogue": 12,
    "variables": 1,
    "frequent-words": 1,
    "common-words": 1,
    "qa": 4,
    "text": 699,
}


@pytest.fixture(scope="module")
def writer() -> SampleWriter:
    return SampleWriter(FOLDER, WORDS, TEXTS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_every_task_is_covered() -> None:
    assert list(ASKED) == list(TASKS)


@pytest.mark.parametrize("task", list(TASKS))
def test_streams_have_the_length_and_the_answers_asked_for(task: str, writer: SampleWriter) -> None:
    for number in range(3):
        sample = TASKS[task].sample(writer, 700, seed=0, number=number)
        assert len(sample.ids) == 700
        assert len(sample.answers) == ASKED[task]
        assert all(0 < a.start < a.end <= 700 for a in sample.answers)
        assert sample == TASKS[task].sample(writer, 700, seed=0, number=number)
    assert TASKS[task].sample(writer, 700, seed=1, number=0) != TASKS[task].sample(writer, 700, seed=0, number=0)


def test_wording_is_the_trained_one(writer: SampleWriter, tokenizer: Tokenizer) -> None:
    conversation = Conversation()
    conversation.tell({"gate": "lion", "fabric": "pumpkin"})
    conversation.tell({"gate": "owl"}, update=True)
    conversation.read()
    conversation.recall("gate", "owl")
    sample = writer.conversation(random.Random(0), conversation, 120)
    text = tokenizer.decode(list(sample.ids), skip_special_tokens=False)
    before, after = text.split("Read this:\n")
    assert before == (
        "<|im_start|>user\nRemember: the gate is lion; the fabric is pumpkin.<|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n"
        "<|im_start|>user\nUpdate: the gate is owl.<|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n<|im_start|>user\n"
    )
    assert "<|im_start|>user\nWhat is the gate?<|im_end|>\n<|im_start|>assistant\nThe gate is owl.<|im_end|>" in after
    (answer,) = sample.answers
    assert tokenizer.decode(list(sample.ids[answer.start : answer.end])) == " owl"
    assert tokenizer.decode(list(sample.ids[answer.start - 3 : answer.start])) == "The gate is"


def test_later_statements_count(writer: SampleWriter, tokenizer: Tokenizer) -> None:
    """Replays the text of updates as a reader would, and compares with the answers."""
    for number in range(5):
        sample = TASKS["updates"].sample(writer, 900, seed=3, number=number)
        known: dict[str, str] = {}
        updated: set[str] = set()
        for line in tokenizer.decode(list(sample.ids), skip_special_tokens=False).split("<|im_end|>"):
            for opener in ("user\nRemember: ", "user\nUpdate: "):
                if opener in line:
                    for fact in line.split(opener)[1].rstrip(".").split("; "):
                        key, value = fact.removeprefix("the ").split(" is ")
                        if "Update" in opener:
                            updated.add(key)
                        known[key] = value
        for answer in sample.answers:
            words = tokenizer.decode(list(sample.ids[answer.start - 2 : answer.end])).split()
            assert words == [words[0], "is", known[words[0]]]
            assert answer.group == ("updated" if words[0] in updated else "first value")
        assert len(updated) == 3


def test_filler_is_shared_between_its_places(writer: SampleWriter, tokenizer: Tokenizer) -> None:
    conversation = Conversation()
    for _ in range(3):
        conversation.read()
    conversation.recall("gate", "owl")
    sample = writer.conversation(random.Random(0), conversation, 500)
    parts = tokenizer.decode(list(sample.ids), skip_special_tokens=False).split("Read this:\n")[1:]
    sizes = [len(tokenizer.encode(part.split("<|im_end|>")[0]).ids) for part in parts]
    assert max(sizes) - min(sizes) < 12


def test_too_short_a_stream_says_what_is_needed(writer: SampleWriter) -> None:
    with pytest.raises(ConfigError, match=r"64 tokens cannot hold the task, which alone takes \d+"):
        TASKS["multi-query"].sample(writer, 64, 0, 0)


def test_bytes_of_text(writer: SampleWriter, tokenizer: Tokenizer) -> None:
    sample = TASKS["text"].sample(writer, 300, 0, 0)
    assert sample.text_bytes == len(tokenizer.decode(list(sample.ids[1:]), skip_special_tokens=False).encode())


def test_without_a_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    writer = SampleWriter(tmp_path, WORDS, TEXTS, {"bos_token": "<|endoftext|>"})
    sample = TASKS["single"].sample(writer, 100, 0, 0)
    text = tokenizer.decode(list(sample.ids), skip_special_tokens=False)
    assert text.startswith("<|endoftext|>User: Remember: the ")
    assert "\nAssistant: Noted.\n" in text


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        SampleWriter(tmp_path, WORDS, TEXTS)


def test_no_filler() -> None:
    with pytest.raises(ConfigError, match="--text"):
        SampleWriter(FOLDER, WORDS, [""])
