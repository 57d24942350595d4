"""Runs a command of the project as users do, shared by tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(words: Sequence[str], folder: Path) -> Run:
    """What calls ``words`` in ``folder`` with more arguments, bytes for standard input and environment variables."""

    def call(*args: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*words, *map(str, args)],
            input=stdin,
            capture_output=True,
            timeout=120,
            cwd=folder,
            env={**os.environ, **environment},
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return call
