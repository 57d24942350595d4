"""The kernels against the oracle, in Triton's interpreter and, where there is a device, on it.

In processes of their own: which of the two it is Triton decides when it is imported, and torch imports it early.
By hand: ``TRITON_INTERPRET=1 pytest tests/gpu/kernels/checks/check_evict.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CHECKS = sorted((Path(__file__).parent / "checks").glob("check_*.py"))
ROOT = Path(__file__).parents[3]
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("place", ["interpreter", pytest.param("cuda", marks=on_device)])
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_kernels_equal_the_oracle(path: Path, place: str) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = str(int(place == "interpreter"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_there_are_checks_of_each_module_of_kernels() -> None:
    modules = (ROOT / "gpu" / "kernels").glob("[a-z]*.py")
    assert sorted(f"check_{module.stem}" for module in modules) == [path.stem for path in CHECKS]
