"""Peers in turn: at each context every worker reads up to it, then all decode a few steps, one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from host import Worker, WorkerError
from registry import Peer
from table import agreement, problem, ratio, step_ms


@dataclass
class Lane:
    """A peer while it is measured; ``row`` becomes its row of the results."""

    name: str
    peer: Peer
    folder: Path
    log: Path
    contexts: list[int]
    options: dict[str, str]
    row: dict[str, Any]
    worker: Worker | None = None
    windows: dict[int, list[list[float]]] = field(default_factory=dict)
    events: dict[int, list[float]] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    rss: dict[int, int] = field(default_factory=dict)
    steps_per_event: int | None = None

    def start(self, threads: int, length: int) -> None:
        """Loads it; a failure is noted in the row."""
        command: list[str | Path] = [self.peer.python, self.peer.script, "serve", "--folder", self.folder]
        command += ["--threads", str(threads), "--length", str(length)]
        command += [f"--option={key}={value}" for key, value in self.options.items()]
        try:
            self.worker = Worker(command, self.log)
        except WorkerError as error:
            self.row["missing"] = str(error)
            return
        loaded = self.worker.loaded
        self.row |= {"load_s": loaded["load_s"], "loaded_rss": loaded["rss"], **loaded["about"]}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """An answer; empty, and the lane closed, when the worker ended."""
        if self.worker is None:
            return {}
        try:
            return self.worker.ask(do, **arguments)
        except WorkerError as error:
            self.row["missing"] = str(error)
            self.close()
            return {}

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def milliseconds(self, context: int) -> list[float]:
        return step_ms(self.windows.get(context, []), self.events.get(context, []), self.steps_per_event)


@dataclass(frozen=True)
class Plan:
    """How much is measured: ``rounds`` times the whole stream, ``turns`` windows of ``steps`` at each context."""

    contexts: Sequence[int]
    threads: int
    rounds: int
    turns: int
    steps: int


def run_group(lanes: Sequence[Lane], plan: Plan, reference: dict[str, Any]) -> None:
    """Measures lanes side by side; their rows are filled except for ratios."""
    try:
        for lane in lanes:
            print(f"  loading {lane.name} ...", flush=True)
            lane.start(plan.threads, max(lane.contexts) + plan.steps * (plan.turns + 1) + 1)
            _check(lane, reference)
        for number in range(plan.rounds):
            started = time.perf_counter()
            for lane in lanes:
                lane.ask("reset")
            for context in plan.contexts:
                _at(context, lanes, plan)
            seconds = time.perf_counter() - started
            left = (plan.rounds - number - 1) * seconds
            print(f"  round {number + 1} of {plan.rounds}: {seconds:.0f} s; about {left:.0f} s left here", flush=True)
    finally:
        for lane in lanes:
            lane.close()


def _check(lane: Lane, reference: dict[str, Any]) -> None:
    """Notes how well a lane's logits agree with transformers'."""
    answer = lane.ask("check", prompt=reference["prompt"], steps=len(reference["greedy"]))
    if not answer:
        return
    check: dict[str, Any] = agreement(answer["logits"], answer["greedy"], reference)
    lane.row["check"] = check
    if wrong := problem(check, lane.row["weights"], reference["dtype"]):
        lane.row["missing"] = f"not the same weights: {wrong}"
        lane.close()


def _at(context: int, lanes: Sequence[Lane], plan: Plan) -> None:
    running = [lane for lane in lanes if context in lane.contexts]
    for lane in running:
        if read := lane.ask("prefill", to=context):
            lane.prefill.setdefault(context, []).append(read["tokens"] / read["seconds"])
    for turn in range(plan.turns + 1):
        for lane in running[turn % len(running) :] + running[: turn % len(running)]:
            answer = lane.ask("decode", steps=plan.steps)
            if answer and turn:  # the first window warms up
                lane.windows.setdefault(context, []).append(answer["seconds"])
    for lane in running:
        if events := lane.ask("events"):
            lane.events.setdefault(context, []).extend(events["seconds"])
            lane.steps_per_event = events["steps_per_event"]
        if memory := lane.ask("memory"):
            lane.rss[context] = memory["rss"]
            lane.row["peak_rss"] = memory["peak_rss"]
    shown = (f"{lane.name} {median(ms):.2f}" for lane in running if (ms := lane.milliseconds(context)))
    print(f"  at {context:>6,}: ms per token: {', '.join(shown)}", flush=True)


def fill(lane: Lane, reference: Lane | None) -> None:
    """Turns samples into the row's numbers; ratios are to ``reference``, measured in the same turns."""
    cells: dict[str, dict[str, Any]] = {}
    for context in lane.contexts:
        mine = lane.milliseconds(context)
        if not mine:
            continue
        cell: dict[str, Any] = {
            "decode_ms": median(mine),
            "decode_ms_windows": [round(value, 4) for value in mine],
            "prefill_tokens_per_s": median(lane.prefill[context]),
            "rss": lane.rss.get(context),
        }
        if lane.steps_per_event and lane.events.get(context):
            cell["event_ms"] = median(lane.events[context]) * 1e3
        if reference is not None:
            cell["decode_ratio"] = ratio(mine, reference.milliseconds(context))
            cell["prefill_ratio"] = ratio(lane.prefill[context], reference.prefill.get(context, []))
        cells[str(context)] = cell
    if cells:
        lane.row["contexts"] = cells
