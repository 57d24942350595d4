"""What every benchmark shares: exporting a case, describing the machine, storing results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export, tool_versions
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine

RESULTS = Path(__file__).parent / "results"
ENGINES = ("executorch", "onnx")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have; ``--output`` is where the JSON goes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    options.add_argument("--threads", type=int, default=1, help="threads of each engine (default 1: least noise)")
    return options


@contextmanager
def exported(**settings: Any) -> Iterator[Path]:
    """A verified artefact in a temporary folder; ``settings`` are those of :class:`ExportRequest`."""
    with tempfile.TemporaryDirectory() as folder:
        request = replace(ExportRequest(model="tiny", output=Path(folder) / "artefact"), **settings)
        run_export(plan_export(request), lambda line: None)
        yield request.output


def open_engine(folder: Path, name: str, threads: int | None) -> Engine:
    """An engine of an artefact."""
    artefact = Artefact.load(folder, verify=False)
    return load_engine(artefact, name, threads)


def feed(engine: Engine, tokens: Iterable[int]) -> None:
    """Reads tokens in the largest chunks that fit, running events as they fall due."""
    pending = list(tokens)
    while pending:
        size = min(engine.room, engine.config.prefill_chunk, len(pending))
        engine.prefill(pending[:size])
        del pending[:size]
        if engine.room == 0:
            engine.evict()


def read_stream(engine: Engine, text: Sequence[int]) -> tuple[list[FloatArray], list[IntArray]]:
    """Reads from an empty cache: chunks until it is full, then single tokens.

    Returns:
        the logits of each call, and what each event kept, ``[layers, kv_heads, budget]``.
    """
    engine.reset()
    logits: list[FloatArray] = []
    kept: list[IntArray] = []
    at = 0
    while at < len(text):
        left = engine.config.slots - at
        count = min(engine.config.prefill_chunk, left) if left > 0 else 1
        logits.append(engine.prefill(text[at : at + count]))
        at += count
        if engine.room == 0:
            engine.evict()
            kept.append(engine.survivors())
    return logits, kept


def shared(one: IntArray, other: IntArray) -> int:
    """Entries that both keep, head by head; positions ``[..., budget]``."""
    rows = (array.reshape(-1, array.shape[-1]) for array in (one, other))
    return sum(int(np.isin(left, right).sum()) for left, right in zip(*rows, strict=True))


def rss() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def copy_bandwidth(threads: int = 1, size: int = 2**28, repeats: int = 9) -> float:
    """GB/s of copying an array that no cache holds, bytes read and bytes written both counted."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begun = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            seconds.append(time.perf_counter() - begun)
    return 2 * size / median(seconds) / 1e9


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def save(path: Path, name: str, results: Any) -> None:
    """Stores results with the machine, the versions and the date."""
    record = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": psutil.cpu_count(logical=False),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "python": platform.python_version(),
        },
        "versions": tool_versions(),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"stored {path}")


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
