"""The benchmark of gate training on a device: what it computes, and that it runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_training
from gpu_benchmark import run
from gpu_training import exponent


def test_smoke_runs_and_stores_nothing(tmp_path: Path) -> None:
    done = run(gpu_training.__file__, "--smoke", "--output", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a step of 64 tokens ran",
        "a step of 128 tokens ran",
        "smoke run on the CPU: no measurement, nothing stored",
    ]
    assert list(tmp_path.iterdir()) == []


def test_exponents() -> None:
    rows = [{"tokens": 8, "bytes": 5, "seconds": 1.0}, {"tokens": 16}, {"tokens": 32, "bytes": 20, "seconds": 16.0}]
    assert exponent(rows, "bytes") == 1.0
    assert exponent(rows, "seconds") == 2.0
