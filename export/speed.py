"""How fast a finished target decodes: one short measurement at the end of an export, for the model card."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from trimkv_edge.engine import Engine
from trimkv_edge.mixed_engine import MixedEngine

STEPS = 64
_WARM_UP = 2


def measure_speed(engine: Engine, *, steps: int = STEPS, seconds: float = 10.0) -> dict[str, Any]:
    """Decodes greedily from where the engine stands; it should hold a full cache, as after verification.

    Args:
        engine: its stream goes on by up to ``steps`` tokens and some to warm up.
        steps: most steps that count.
        seconds: no further step starts after this time.

    Returns:
        ``decode_ms``: median milliseconds per token, events left out; ``steps``: how many; ``event_ms``: median
        milliseconds of an eviction event, 0 if none fell due; ``entries``: entries per head at the end (the mean, where
        heads share a budget); ``threads``: of the engine, 0 if it does not say; ``device``: the processor. Empty if the
        stream has no positions left.
    """
    events: list[float] = []
    decodes: list[float] = []
    token = 0
    end = perf_counter() + seconds
    while len(decodes) < _WARM_UP + steps and engine.seen < engine.position_limit:
        if engine.room == 0:
            started = perf_counter()
            engine.evict()
            events.append(perf_counter() - started)
        started = perf_counter()
        logits = engine.decode(token)
        decodes.append(perf_counter() - started)
        if isinstance(engine, MixedEngine):
            logits[list(engine.placeholders)] = -np.inf  # they stand for rows of pictures
        token = int(logits.argmax())
        if perf_counter() > end:
            break
    counted = decodes[_WARM_UP:] or decodes
    if not counted:
        return {}
    return {
        "decode_ms": _milliseconds(counted),
        "steps": len(counted),
        "event_ms": _milliseconds(events) if events else 0.0,
        "entries": round(engine.entries / (engine.num_layers * engine.num_kv_heads)),
        "threads": getattr(engine, "threads", None) or 0,
        "device": processor(),
    }


def _milliseconds(seconds: list[float]) -> float:
    return float(f"{1000 * statistics.median(seconds):.3g}")


def processor() -> str:
    """The processor's name and the number of its CPUs that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {usable} CPU{'s' if usable != 1 else ''}"
