"""What benchmarks of a CUDA device share: asking for one, clocks that run on it, and its name."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from common import median

from trimkv_edge.errors import TrimKVError

# More than the last cache of any device so far holds.
_FLUSHED = 2**28
_WARM_UPS = 3


def require_cuda() -> None:
    """Raises :class:`TrimKVError` where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise TrimKVError(
            f"this measures a CUDA device and torch {torch.__version__} sees none: run it where one is, or see that it "
            "runs at all with --smoke, which measures nothing"
        )


def device_record() -> dict[str, Any]:
    """The device and what drives it, for stored results."""
    properties = torch.cuda.get_device_properties(0)
    driver = None
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def seconds(
    step: Callable[[], object],
    prepare: Callable[[], object] = lambda: None,
    repeats: int = 30,
    device: str = "cuda",
) -> list[float]:
    """Times of a step on the device, each with cold caches and without what launching costs: it is a CUDA graph.

    Args:
        prepare: runs before each step, outside the clock and the graph.
    """
    if device != "cuda":
        return [_on_cpu(step, prepare) for _ in range(repeats)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            prepare()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        prepare()
        flushed.zero_()
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3)
    return times


def _on_cpu(step: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def device_copy_bandwidth(size: int = 2**32, device: str = "cuda") -> float:
    """GB/s of copying ``size`` bytes on the device, bytes read and bytes written both counted."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / median(seconds(lambda: target.copy_(source), device=device)) / 1e9
