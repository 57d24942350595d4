"""The torch engine over the Triton kernels, in the interpreter and, where there is a device, on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = Path(__file__).parents[1] / "engine_on_kernels.py"
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("place", ["interpreter", pytest.param("cuda", marks=on_device)])
def test_the_engine_over_the_kernels_agrees_with_the_eager_engine(place: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(place == "interpreter")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), place]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    agree = [f"{policy} agrees{where}" for policy in ("trimkv", "global") for where in ("", " in a batch")]
    assert done.stdout.splitlines() == agree
