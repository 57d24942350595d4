"""What an interrupted export leaves in the cache folder, for the next export of the same numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimkv_edge.budget import format_bytes
from trimkv_edge.models.random_weights import cache_folder

# Repeating less than this costs seconds.
RESUMABLE = 256 * 2**20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Numbers:
    """What the packed weights of an export follow from, beside the graph.

    Attributes:
        key: of the source's weights, gates and scheme; empty: an interrupted export is not gone on with.
        restart: throw away what an interrupted export left.
        say: called with one line if there was something.
        progress: called with (bytes done, bytes in all).
    """

    key: str = ""
    restart: bool = False
    say: Callable[[str], None] = lambda line: None
    progress: Progress | None = None

    def go_on(self, done: int, total: int) -> None:
        """Says that ``done`` of ``total`` bytes need not be packed again."""
        of = f"{format_bytes(done)} of {format_bytes(total)} are packed"
        self.say(f"going on where an interrupted export stopped: {of}")


def kept_folder(*what: Any) -> Path:
    """The folder of an export that ``what`` (as JSON) stands for; it need not exist."""
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return cache_folder() / "exports" / digest[:24]


@contextmanager
def owned(folder: Path | None, restart: bool = False) -> Iterator[Path | None]:
    """The folder, made if it was missing; None if there is none to have or another export uses it now.

    Args:
        restart: empty it first.
    """
    if folder is None:
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
    finally:
        lock.release()
