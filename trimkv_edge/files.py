"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a text file beside ``path``, then puts it in its place."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Puts the file that ``write`` makes in the place of ``path``; when this returns it outlasts a loss of power.

    One writer of ``path`` at a time: the name beside it is always the same, so that nothing piles up after kills.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place when the block ends well and vanishes when it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    old = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        yield folder
        folder.chmod(0o755)
        if output.exists():
            os.replace(output, old)
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
