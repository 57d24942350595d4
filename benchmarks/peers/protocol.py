"""The worker's side: one JSON object per line on stdin, one answer per line on stdout. numpy and psutil only.

A worker script defines a :class:`Model` and a ``build``; ``run`` gives it two commands:

    python worker_x.py build --weights DIR --output DIR --quant Q --option NAME=VALUE ...
    python worker_x.py serve --folder DIR --threads N --length L --option NAME=VALUE ...
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG


class Model(ABC):
    """A loaded model with an empty cache, made by ``cls(folder, threads, length, options)``.

    ``length`` is the longest stream that will come. ``event_seconds`` collects the time of eviction events, which are
    left out of the time of a step; ``steps_per_event`` says how many steps pay for one.
    """

    vocabulary: int
    steps_per_event: int | None = None

    def __init__(self) -> None:
        self.event_seconds: list[float] = []

    @abstractmethod
    def reset(self) -> None:
        """Starts a new stream."""

    @abstractmethod
    def feed(self, tokens: list[int]) -> None:
        """Reads tokens after those read before; the logits after the last are known when it returns."""

    @abstractmethod
    def step(self) -> int:
        """Chooses the greedy token from the newest logits, reads it, and returns it."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """``[vocabulary]`` after the newest token."""

    def about(self) -> dict[str, Any]:
        """What else the table should say: versions, data types."""
        return {}


def run(build: Callable[[Path, Path, str, dict[str, str]], None], model: Callable[..., Model]) -> None:
    """Entry point of a worker script."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    builder, server = commands.add_parser("build"), commands.add_parser("serve")
    for part in (builder, server):
        part.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    builder.add_argument("--weights", type=Path, required=True)
    builder.add_argument("--output", type=Path, required=True)
    builder.add_argument("--quant", required=True)
    server.add_argument("--folder", type=Path, required=True)
    server.add_argument("--threads", type=int, required=True)
    server.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.option)
    if args.command == "build":
        build(args.weights, args.output, args.quant, options)
    else:
        _serve(lambda: model(args.folder, args.threads, args.length, options))


def _serve(load: Callable[[], Model]) -> None:
    _die_with_parent()
    # Libraries print to stdout: the answers get a descriptor of their own, and the rest goes to the log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    model = load()
    session = _Session(model)
    seconds = time.time() - psutil.Process().create_time()
    _answer(answers, {"load_s": seconds, **session.memory(), "about": model.about()})
    for line in sys.stdin:
        message = json.loads(line)
        _answer(answers, getattr(session, message.pop("do"))(**message))


def _answer(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _die_with_parent() -> None:
    if sys.platform == "linux":  # a stopped worker would outlive a runner that was killed
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)


class _Session:
    """What the runner may ask; every method is one request and returns its answer."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.position = 0
        self.random = np.random.default_rng(0)

    def reset(self) -> dict[str, Any]:
        self.model.reset()
        self.model.event_seconds.clear()
        self.position = 0
        self.random = np.random.default_rng(0)
        return {}

    def prefill(self, to: int) -> dict[str, Any]:
        """Random tokens, the same for every worker, until the stream has ``to``."""
        count = to - self.position
        tokens = self.random.integers(3, self.model.vocabulary, count).tolist()
        started = time.perf_counter()
        self.model.feed(tokens)
        self.position = to
        return {"tokens": count, "seconds": time.perf_counter() - started}

    def decode(self, steps: int) -> dict[str, Any]:
        """Greedy steps; the time of each in seconds, events left out."""
        seconds = []
        for _ in range(steps):
            events = sum(self.model.event_seconds)
            started = time.perf_counter()
            self.model.step()
            spent = time.perf_counter() - started
            seconds.append(spent - (sum(self.model.event_seconds) - events))
        self.position += steps
        return {"seconds": seconds}

    def check(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Logits after a prompt on an empty cache, and the greedy continuation."""
        self.reset()
        self.model.feed(prompt)
        logits = np.asarray(self.model.logits(), np.float64).tolist()
        greedy = [self.model.step() for _ in range(steps)]
        self.reset()
        return {"logits": logits, "greedy": greedy}

    def memory(self) -> dict[str, Any]:
        info = psutil.Process().memory_info()
        return {"rss": info.rss, "peak_rss": _peak(info.rss)}

    def events(self) -> dict[str, Any]:
        """Seconds of each eviction event since the stream began."""
        return {"seconds": list(self.model.event_seconds), "steps_per_event": self.model.steps_per_event}


def _peak(now: int) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return now
