"""What all benchmarks of a CUDA device say where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_benchmark import BENCHMARKS, run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["gpu_batch", "gpu_decode", "gpu_kernels", "gpu_training"])
def test_without_cuda_it_refuses_in_one_line(name: str, tmp_path: Path) -> None:
    done = run(BENCHMARKS / f"{name}.py", "--output", str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: this measures a CUDA device")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_are_asked() -> None:
    found = {path.stem for path in BENCHMARKS.glob("gpu_*.py")} - {"gpu_common"}
    assert found == {"gpu_batch", "gpu_decode", "gpu_kernels", "gpu_training"}
