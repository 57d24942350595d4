"""Data of every form becomes the right rows; what cannot be used is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from trimkv_edge.errors import ConfigError
from trimkv_edge.models.source import TINY
from trimkv_edge.training.data import DataConfig, read_rows
from trimkv_edge.training.rows import Rows

VOCAB = 2048
EOS = 2  # <|im_end|> is the shipped tokenizer's end token
CHAT = [
    {"role": "user", "content": "What is the gate?"},
    {"role": "assistant", "content": "The gate is owl."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Noted."},
]


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "weights")


def read(*sources: Path | str, length: int = 16, **more: Any) -> Rows:
    return read_rows(DataConfig(tuple(map(str, sources)), length, VOCAB, **more), tokenizer)


def lines(path: Path, *items: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def test_texts_are_joined_and_cut(tmp_path: Path) -> None:
    texts = ["The gate is owl. " * 5, "What is the fabric? " * 4]
    (tmp_path / "b.txt").write_text(texts[1])
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "notes.md").write_text("not data")
    encode = tokenizer()
    stream = [*encode(texts[0])["input_ids"], EOS, *encode(texts[1])["input_ids"], EOS]
    rows = read(tmp_path)
    assert rows.kind == "text"
    assert len(rows) == len(stream) // 16
    assert torch.cat(rows.ids).tolist() == stream[: len(rows) * 16]
    item = rows.item(0)
    assert item["index"].tolist() == list(range(16))
    assert item["weight"].tolist() == [0.0] + [1.0] * 15  # nothing predicts the first token
    assert int(item["held"]) == 16
    same = lines(tmp_path / "same.jsonl", {"text": texts[0]}, {"text": texts[1]})
    assert torch.cat(read(same).ids).tolist() == torch.cat(rows.ids).tolist()
    other = lines(tmp_path / "column.jsonl", {"story": texts[0]}, {"story": texts[1]})
    assert torch.cat(read(other, text_column="story").ids).tolist() == torch.cat(rows.ids).tolist()


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    file = lines(tmp_path / "chats.jsonl", {"messages": CHAT[:2]}, {"messages": CHAT})
    rows = read(file, length=64)
    encode = tokenizer()
    text = "<|im_start|>user\nWhat is the gate?<|im_end|>\n<|im_start|>assistant\nThe gate is owl.<|im_end|>\n"
    ids = encode(text)["input_ids"]
    assert rows.ids[0].tolist() == ids
    item = rows.item(0)
    assert item["input_ids"].tolist() == ids + [0] * (64 - len(ids))
    assert item["weight"].tolist() == [0.0] + [1.0] * (len(ids) - 1) + [0.0] * (64 - len(ids))
    assert int(item["held"]) == len(ids)
    assert len(read(file, length=12).ids[1]) == 12


def test_answers_only_weighs_what_the_assistant_said_and_the_end_of_its_turn(tmp_path: Path) -> None:
    rows = read(lines(tmp_path / "chats.jsonl", {"messages": CHAT}), length=64, answers_only=True)
    encode = tokenizer()
    said = [number for number, w in enumerate(rows.item(0)["weight"].tolist()) if w]
    assert encode.decode(rows.ids[0][said]) == "The gate is owl.<|im_end|>Noted.<|im_end|>"


def test_ready_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    full = {"input_ids": [5, 6, 7, 8], "index": [0, 1, 90, 91], "weight": [1, 0, 2.5, 1], "skip": [0, 2, 2, 88]}
    rows = read(lines(tmp_path / "rows.jsonl", full, "", {"input_ids": [9, 10]}), length=6)
    item = rows.item(0)
    assert item["input_ids"].tolist() == [5, 6, 7, 8, 0, 0]
    assert item["index"].tolist() == [0, 1, 90, 91, 92, 93]
    assert item["weight"].tolist() == [0.0, 0.0, 2.5, 1.0, 0.0, 0.0]
    assert item["skips"].tolist() == [0, 2, 2, 88]
    assert rows.item(1)["skips"].tolist() == [0, 0, 0, 0]
    assert rows.tokens == 6


def test_data_sets_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    text = "The gate is owl. " * 8
    made = datasets.Dataset.from_dict({"story": [text]})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": made}).save_to_disk(tmp_path / "split")
    expected = tokenizer()(text)["input_ids"][:16]
    assert read(tmp_path / "one", text_column="story").ids[0].tolist() == expected
    assert read(tmp_path / "split", text_column="story", split="validation").ids[0].tolist() == expected
    with pytest.raises(ConfigError, match=r"has no split 'train'; it has validation"):
        read(tmp_path / "split", text_column="story")
    chats = datasets.Dataset.from_dict({"messages": [CHAT]})
    chats.save_to_disk(tmp_path / "chats")
    assert read(tmp_path / "chats", length=64).kind == "chat"


def test_the_hash_notices_every_change(tmp_path: Path) -> None:
    base = {"input_ids": [5, 6, 7], "weight": [1, 1, 1], "index": [0, 1, 2], "skip": [0, 1, 1, 4]}
    changes = [{}, {"input_ids": [5, 6, 8]}, {"weight": [1, 1, 2]}, {"index": [0, 1, 3]}, {"skip": [0, 1, 1, 5]}]
    hashes = [read(lines(tmp_path / "a.jsonl", {**base, **change})).sha256() for change in changes]
    assert len(set(hashes)) == len(changes)
    assert read(lines(tmp_path / "b.jsonl", base)).sha256() == hashes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (['{"input_ids": [5, 6'], r"data\.jsonl:1 is not JSON"),
        (["[1, 2]"], r"data\.jsonl:1 is not a JSON object"),
        ([{"input_ids": [5, 6]}, {"story": "x"}], r"data\.jsonl:2 has story, but needs 'text'"),
        ([{"input_ids": [5, 6]}, {"text": "x"}], r"data\.jsonl:1 is rows, but .*data\.jsonl:2 is text"),
        ([{"input_ids": [5, 2048]}], r"data\.jsonl:1 holds token id 2048, but the model's vocabulary has 2048"),
        ([{"input_ids": [5, -1]}], r"holds token id -1"),
        ([{"input_ids": [5]}], r"has 1 tokens: a row needs at least 2"),
        ([{"input_ids": []}], r"has 0 tokens"),
        ([{"input_ids": list(range(17))}], r"has 17 tokens, but rows are 16 long: give --length 17"),
        ([{"input_ids": [5, "6"]}], r"input_ids must be a list of integers"),
        ([{"input_ids": [5, 6], "weight": [1]}], r"weight has 1 values for 2 input_ids"),
        ([{"input_ids": [5, 6], "weight": [1, -1]}], r"weights must be 0 or more"),
        ([{"input_ids": [5, 6], "weight": [0, 0]}], r"all weights in .* are 0"),
        ([{"input_ids": [5, 6], "index": [1, 1]}], r"index must be 0 or more and increase"),
        ([{"input_ids": [5, 6], "skip": [0, 1, 1]}], r"skip must be \[start, end, resume, gap\]"),
        ([{"input_ids": [5, 6], "skip": [0, 3, 1, 9]}], r"skip \[0, 3, 1, 9\] must be"),
        ([{"messages": [{"role": "user"}]}], r"messages must be a list of objects with text 'role' and 'content'"),
        ([{"messages": []}], r"messages must be a list"),
        ([{"text": "The gate is owl."}], r"has \d+ tokens, less than one row of 16"),
        ([""], r"is empty"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, content: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(lines(tmp_path / "data.jsonl", *content))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00text")
    with pytest.raises(ConfigError, match=r"bad\.txt cannot be read as UTF-8"):
        read(tmp_path / "bad.txt")
    (tmp_path / "sheet.csv").write_text("a,b")
    with pytest.raises(ConfigError, match=r"sheet\.csv is neither \.txt nor \.jsonl"):
        read(tmp_path / "sheet.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.txt or \.jsonl files"):
        read(tmp_path / "empty")
    lines(tmp_path / "text.jsonl", {"text": "The gate is owl. " * 9})
    with pytest.raises(ConfigError, match=r"--answers-only is for chats"):
        read(tmp_path / "text.jsonl", answers_only=True)


def test_a_template_that_changes_answers_is_noticed(tmp_path: Path) -> None:
    changed = tokenizer()
    changed.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    file = lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    config = DataConfig((str(file),), 64, VOCAB, answers_only=True)
    with pytest.raises(ConfigError, match=r"the chat template changes the answer 'The gate is owl\.'"):
        read_rows(config, lambda: changed)
    changed.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template"):
        read_rows(config, lambda: changed)


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"data nobody/nothing: no such file or folder, and it cannot be loaded"):
        read("nobody/nothing")
