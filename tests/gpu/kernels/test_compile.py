"""The kernels compile for CUDA devices, which takes none; whether they run there is for a device to show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = Path(__file__).parents[2] / "compiled_kernels.py"
# Bytes of shared memory that a program may have: of an A100 and of an H100 or H200.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_and_stay_in_registers(arch: int, tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 3 + 18 + 3
    assert {case: result for case, result in results.items() if result["spilled"]} == {}
    assert max(result["shared"] for result in results.values()) <= SHARED[arch]
