"""Finished cells of a sweep on disk: one JSON line each, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.statistics import Interval, bootstrap
from trimkv_edge.files import replace_text

CELLS_FILE = "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """One method on one task at one length and budget.

    Attributes:
        model: name and weight hash of the base, or the artefact's manifest hash.
        gates: hash of the gate file, empty if the policy reads none.
        engine: what ran it.
        budget: entries M per KV head; None for the full cache. At most ``budget + buffer`` are held.
        share: the budget as asked for (``12.5%`` or ``64``); empty for the full cache.
        streams: per stream: group of answers -> (sum, count); the sum is of right answers, or of nats in plain text.
        text_bytes: per stream, bytes of the predicted text (0 for questions).
        seconds: wall time.
    """

    task: str
    unit: str
    length: int
    method: str
    model: str
    gates: str
    engine: str
    budget: int | None
    share: str
    buffer: int
    seed: int
    lookahead: int
    streams: list[dict[str, list[float]]]
    text_bytes: list[int]
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Two cells with the same key hold the same measurement."""
        names = ("task", "length", "method", "model", "gates", "engine", "budget", "buffer", "seed", "lookahead")
        return (*(getattr(self, name) for name in names), len(self.streams))

    @property
    def groups(self) -> list[str]:
        """Groups of answers, if the task splits them."""
        return sorted({group for stream in self.streams for group in stream if group})

    def totals(self, group: str | None = None) -> tuple[list[float], list[float]]:
        """Per stream: sum and number of answers, of one group or of all."""
        chosen = [[pair for name, pair in stream.items() if group in (None, name)] for stream in self.streams]
        return [sum(p[0] for p in pairs) for pairs in chosen], [sum(p[1] for p in pairs) for pairs in chosen]

    def interval(self, group: str | None = None) -> Interval:
        """Mean over answers (or tokens) with its bootstrap interval over streams."""
        return bootstrap(*self.totals(group))

    @property
    def bits_per_byte(self) -> float:
        """Of plain text."""
        return sum(self.totals()[0]) / math.log(2) / sum(self.text_bytes)


class ResultFile:
    """The cells of one results folder.

    Args:
        folder: made if it does not exist.

    Raises:
        ConfigError: a line other than the last is damaged.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / CELLS_FILE
        self.cells: dict[tuple[Any, ...], Cell] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines):
            try:
                cell = Cell(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number == len(lines) - 1:  # cut off when a sweep was killed: that cell is run again
                    self._rewrite()
                    break
                raise ConfigError(f"{self.path}, line {number + 1} is damaged ({error}): remove it") from error
            self.cells[cell.key] = cell

    def add(self, cell: Cell) -> None:
        """Appends a cell; it is on disk when this returns."""
        self.cells[cell.key] = cell
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(cell))
            file.flush()
            os.fsync(file.fileno())

    def newest(self) -> list[Cell]:
        """What reports are made of: where gates or weights changed since, only the last measurement of a cell."""
        last: dict[tuple[Any, ...], Cell] = {}
        for cell in self.cells.values():
            name = (cell.task, cell.length, cell.method, cell.engine, cell.budget, cell.buffer, cell.seed)
            last.pop(name, None)
            last[name] = cell
        return list(last.values())

    def _rewrite(self) -> None:
        replace_text(self.path, "".join(_line(cell) for cell in self.cells.values()))


def _line(cell: Cell) -> str:
    return json.dumps(asdict(cell)) + "\n"
