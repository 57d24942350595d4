"""Runs a benchmark as its command, shared by tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command with these options, in a process of its own."""
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
