"""From what a user calls data to training rows: text, JSON lines of text, chats or ready rows, or a hub data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trimkv_edge.errors import ConfigError
from trimkv_edge.training.chats import chat_row
from trimkv_edge.training.records import Record, hub_records, local_records
from trimkv_edge.training.rows import Row, Rows


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from.

    Attributes:
        sources: files (.txt, .jsonl), folders of them, folders of a saved data set, or hub ids; all of one kind.
        length: tokens per row.
        vocab_size: ids must be below it.
        split: of data sets.
        text_column: of data sets of text.
        answers_only: chats: only the assistant's tokens weigh.
    """

    sources: tuple[str, ...]
    length: int
    vocab_size: int
    split: str = "train"
    text_column: str = "text"
    answers_only: bool = False


def read_rows(config: DataConfig, tokenizer: Callable[[], Any], progress: bool = False) -> Rows:
    """Reads, tokenises and cuts.

    Texts are joined with the end-of-text token between them and cut into rows of `length`; what is left of the last
    is dropped. Chats are one row each, cut or padded. Ready rows are taken as they are.

    Args:
        config: where from.
        tokenizer: loads the model's tokenizer; called for text and chats only.
        progress: show a bar.

    Raises:
        ConfigError: unreadable, empty or mixed data, ids outside the vocabulary, or less than one row.
        ModelError: no tokenizer.
    """
    if not config.sources:
        raise ConfigError("no data: give --data a .txt or .jsonl file, a folder of them, or a hub data set")
    records = _one_kind(record for source in config.sources for record in _records(source, config))
    first = next(records, None)
    if first is None:
        raise ConfigError(f"data {', '.join(config.sources)} is empty")
    everything = tqdm(_chain(first, records), desc="reading data", unit="record", disable=not progress, leave=False)
    rows = Rows(config.length, first.kind)
    if first.kind == "rows":
        for record in everything:
            rows.add(_ready(record, config))
    elif first.kind == "chat":
        loaded = _with_chat_template(tokenizer())
        for record in everything:
            rows.add(_checked(chat_row(loaded, record, config.answers_only), record.where, config))
    else:
        _cut(rows, everything, tokenizer(), config)
    if config.answers_only and first.kind != "chat":
        raise ConfigError(f"--answers-only is for chats, but {first.where} is {first.kind}")
    if not any(float(rows.item(number)["weight"].sum()) for number in range(len(rows))):
        raise ConfigError(f"all weights in {', '.join(config.sources)} are 0: nothing to learn from")
    return rows


def _records(source: str, config: DataConfig) -> Iterator[Record]:
    path = Path(source)
    saved = path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())
    if path.exists() and not saved:
        return local_records(path, config.text_column)
    return hub_records(source, saved, config.split, config.text_column)


def _chain(first: Record, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest


def _one_kind(records: Iterable[Record]) -> Iterator[Record]:
    first: Record | None = None
    for record in records:
        first = first or record
        if record.kind != first.kind:
            raise ConfigError(
                f"mixed data: {first.where} is {first.kind}, but {record.where} is {record.kind}; train on one kind"
            )
        yield record


def _with_chat_template(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the data are chats, but this model's tokenizer has no chat template: give text instead")
    return tokenizer


def _checked(row: Row, where: str, config: DataConfig) -> Row:
    if len(row.ids) < 2:
        raise ConfigError(f"{where} has {len(row.ids)} tokens: a row needs at least 2")
    worst = max(row.ids) if min(row.ids) >= 0 else min(row.ids)
    if not 0 <= worst < config.vocab_size:
        raise ConfigError(
            f"{where} holds token id {worst}, but the model's vocabulary has {config.vocab_size}: wrong tokenizer?"
        )
    return row


def _ready(record: Record, config: DataConfig) -> Row:
    row: Row = record.value
    count = len(row.ids)
    if count > config.length:
        raise ConfigError(
            f"{record.where} has {count} tokens, but rows are {config.length} long: give --length {count}"
        )
    for name, given in (("index", row.index), ("weight", row.weight)):
        if given is not None and len(given) != count:
            raise ConfigError(f"{record.where}: {name} has {len(given)} values for {count} input_ids")
    if row.index is not None and (
        row.index[0] < 0 or any(a >= b for a, b in zip(row.index, row.index[1:], strict=False))
    ):
        raise ConfigError(f"{record.where}: index must be 0 or more and increase from token to token")
    if row.weight is not None and not all(0 <= weight < float("inf") for weight in row.weight):
        raise ConfigError(f"{record.where}: weights must be 0 or more")
    start, end, resume, gap = row.skip
    if gap < 0 or (gap > 0 and not (0 <= start < end <= count and 0 <= resume < count)):
        raise ConfigError(
            f"{record.where}: skip {list(row.skip)} must be [start, end, resume, gap] with start < end and resume "
            f"inside the row of {count} tokens, and gap 0 or more"
        )
    return _checked(row, record.where, config)


def _cut(rows: Rows, records: Iterable[Record], tokenizer: Any, config: DataConfig) -> None:
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("this model's tokenizer has no end-of-text token to join texts with: give ready rows")
    waiting: list[int] = []
    total = 0
    where = ""
    for record in records:
        where = record.where
        ids = tokenizer(record.value, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        waiting += [*ids, end]
        full = len(waiting) // config.length * config.length
        for start in range(0, full, config.length):
            rows.add(_checked(Row(waiting[start : start + config.length]), where, config))
        del waiting[:full]
    if not len(rows):
        raise ConfigError(
            f"{', '.join(config.sources)} has {total} tokens, less than one row of {config.length} (up to {where}): "
            "give more text or a smaller --length"
        )
