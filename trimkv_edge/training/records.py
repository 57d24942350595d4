"""Single records of data files and data sets, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.training.rows import Row

_SUFFIXES = (".txt", ".jsonl")
_FILES = (*_SUFFIXES, ".json", ".csv", ".parquet", ".md")  # endings that no data set's name has


@dataclass(frozen=True)
class Record:
    """One text (str), chat (list of role and content) or ready row.

    Attributes:
        kind: ``text``, ``chat`` or ``rows``.
        value: str, list of dicts, or :class:`~trimkv_edge.training.rows.Row`.
        where: file and line, or data set and number, for messages.
    """

    kind: str
    value: Any
    where: str


def local_records(path: Path, text_column: str = "text") -> Iterator[Record]:
    """Records of a file, or of all .txt and .jsonl files under a folder in sorted order.

    Raises:
        ConfigError: unreadable, of another format, or a folder without such files.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ConfigError(f"folder {path} holds no {' or '.join(_SUFFIXES)} files")
    elif path.suffix in _SUFFIXES:
        files = [path]
    else:
        raise ConfigError(f"{path} is neither {' nor '.join(_SUFFIXES)}, a folder of them, nor a saved data set")
    for file in files:
        try:
            yield from _text(file) if file.suffix == ".txt" else _json_lines(file, text_column)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as UTF-8 text ({error})") from error


def hub_records(name: str, saved: bool, split: str, text_column: str) -> Iterator[Record]:
    """Records of a data set on the hub, or of one that ``save_to_disk`` wrote.

    Raises:
        ConfigError: not found, cannot be downloaded now, or without such a split.
    """
    import datasets

    if not saved and (name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in _FILES):
        raise ConfigError(f"data {name}: no such file or folder")
    try:
        if saved:
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ConfigError(f"data set {name} has no split {split!r}; it has {', '.join(loaded)}")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(name, split=split)
    except ConfigError:
        raise
    except Exception as error:  # the library's and its transports' errors share no base class
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"data {name}: no such file or folder, and it cannot be loaded as a data set (split {split!r}): {detail}"
        ) from error
    for number, item in enumerate(loaded):
        yield _record(item, f"{name}[{number}]", text_column)


def _text(file: Path) -> Iterator[Record]:
    text = file.read_text(encoding="utf-8")
    if text.strip():
        yield Record("text", text, str(file))


def _json_lines(file: Path, text_column: str) -> Iterator[Record]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{where} is not JSON ({error})") from error
            if not isinstance(item, dict):
                raise ConfigError(f"{where} is not a JSON object")
            yield _record(item, where, text_column)


def _record(item: dict[str, Any], where: str, text_column: str) -> Record:
    if item.get("input_ids") is not None:
        return Record("rows", _row(item, where), where)
    if item.get("messages") is not None:
        return Record("chat", _messages(item["messages"], where), where)
    text = item.get(text_column)
    if isinstance(text, str):
        return Record("text", text, where)
    raise ConfigError(
        f"{where} has {', '.join(sorted(item)) or 'nothing'}, but needs {text_column!r} (text), 'messages' or "
        "'input_ids'; --text-column names another column of text"
    )


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    right = isinstance(messages, list) and bool(messages)
    for message in messages if right else ():
        right = (
            right and isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        )
    if not right:
        raise ConfigError(f"{where}: messages must be a list of objects with text 'role' and 'content'")
    return list(messages)


def _row(item: dict[str, Any], where: str) -> Row:
    ids, index, weight = item["input_ids"], item.get("index"), item.get("weight")
    skip = item.get("skip") or (0, 0, 0, 0)
    for name, values, kinds in (
        ("input_ids", ids, int),
        ("index", index, int),
        ("weight", weight, (int, float)),
        ("skip", skip, int),
    ):
        if values is None:
            continue
        if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, kinds) for v in values):
            raise ConfigError(f"{where}: {name} must be a list of {'numbers' if name == 'weight' else 'integers'}")
    if len(skip) != 4:
        raise ConfigError(f"{where}: skip must be [start, end, resume, gap]")
    return Row(ids, index, weight, tuple(skip))
