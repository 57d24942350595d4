"""One process at a time writes a session file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from trimkv_edge.errors import SessionError, reason


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of ``path``; it ends with the block, or with this process however that ends.

    It lies on a file of its own, ``.NAME.lock``, because a save replaces ``path`` by a new file.

    Raises:
        SessionError: someone holds it, the folder cannot be written, or the system has no such locks.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = _take(path, lock)
    except OSError as error:
        raise SessionError(f"{path} cannot be saved ({reason(error)}): choose a folder you can write") from error
    try:
        yield
    finally:
        # Before the lock is given up: afterwards the name may be another process's.
        lock.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, lock: Path) -> int:
    fcntl = _import_fcntl(path)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_there(handle, lock):
                with suppress(OSError):  # a full disk: then others are not told who has it, but are kept out
                    os.truncate(handle, 0)
                    os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            who = "this process" if holder == str(os.getpid()) else f"process {holder}" if holder else "another process"
            raise SessionError(
                f"{path} is in use by {who}, which will save it: let it end first, or save under another name"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has just removed it


def _still_there(handle: int, lock: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), lock.stat())
    return False


def _import_fcntl(path: Path) -> ModuleType:
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise SessionError(
            f"{path} cannot be saved: this system has no flock, which keeps two processes from writing one session: "
            "save under Linux, macOS or WSL"
        ) from error
    return fcntl
