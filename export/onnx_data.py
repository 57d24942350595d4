"""The weights file of an ONNX graph, written tensor by tensor, so that a later export goes on where one stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trimkv_edge.export.resume import RESUMABLE, Numbers, Progress, kept_folder, owned
from trimkv_edge.files import replace_text

# Smaller ones stay in the graph.
_INLINE = 1024
_PAGE = 4096
_SYNC_EVERY = 64 * 2**20


def save_with_data(model: ir.Model, path: Path, location: str, numbers: Numbers) -> None:
    """Writes the graph to ``path`` and its large initialisers to ``location`` beside it.

    Initialisers are computed one after the other and forgotten. If they are many bytes, they are written in the cache
    folder first; there they stay if the export is interrupted, however that happens.
    """
    plan = _Plan(model.graph, location, path.parent)
    folder = kept_folder(numbers.key, plan.layout) if numbers.key and plan.total >= RESUMABLE else None
    with owned(folder, numbers.restart) as kept:
        if kept is None:
            plan.write(path.parent / location, 0, numbers.progress, None)
        else:
            data, journal = kept / location, kept / "journal.json"
            done = _recorded(data, journal, plan)
            if done:
                numbers.go_on(plan.entries[done - 1].end, plan.total)
            plan.write(data, done, numbers.progress, lambda count: replace_text(journal, json.dumps(count)))
            shutil.move(data, path.parent / location)
            shutil.rmtree(kept)
    plan.point()
    ir.save(model, path)


@dataclass(frozen=True)
class _Entry:
    value: ir.Value
    start: int
    end: int


class _Plan:
    """Where each initialiser goes."""

    def __init__(self, graph: ir.Graph, location: str, folder: Path) -> None:
        self.location, self.folder = location, folder
        self.entries: list[_Entry] = []
        end = 0
        for value in graph.initializers.values():
            size = value.const_value.nbytes if value.const_value is not None else 0
            if size > _INLINE:
                start = -(-end // _PAGE) * _PAGE
                end = start + size
                self.entries.append(_Entry(value, start, end))
        self.total = end

    @property
    def layout(self) -> list[tuple[str | None, int, int]]:
        return [(entry.value.name, entry.start, entry.end) for entry in self.entries]

    def write(self, path: Path, done: int, progress: Progress | None, record: Callable[[int], None] | None) -> None:
        """Writes the entries from number ``done`` on; ``record`` is told how many are safe on the disk."""
        with path.open("r+b" if done else "wb") as file:
            synced = self.entries[done - 1].end if done else 0
            for number, entry in enumerate(self.entries[done:], done + 1):
                file.seek(entry.start)
                assert entry.value.const_value is not None
                file.write(entry.value.const_value.tobytes())
                if progress:
                    progress(entry.end, self.total)
                if record and entry.end - synced >= _SYNC_EVERY:
                    file.flush()
                    os.fsync(file.fileno())
                    record(number)
                    synced = entry.end

    def point(self) -> None:
        """Makes the graph refer to the file."""
        for entry in self.entries:
            value, old = entry.value, entry.value.const_value
            assert old is not None
            value.const_value = ir.ExternalTensor(
                self.location,
                entry.start,
                entry.end - entry.start,
                old.dtype,
                shape=ir.Shape(old.shape.numpy()),
                name=value.name or "",
                base_dir=self.folder,
            )


def _recorded(data: Path, journal: Path, plan: _Plan) -> int:
    """How many entries an earlier export finished."""
    try:
        done = int(json.loads(journal.read_text(encoding="utf-8")))
        return done if 0 < done <= len(plan.entries) and data.stat().st_size >= plan.entries[done - 1].end else 0
    except (OSError, ValueError, TypeError):
        return 0
