"""Runs every method on the same streams: tasks x lengths x methods x budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.methods import Method, entries
from trimkv_edge.evaluation.reader import Progress, Reader
from trimkv_edge.evaluation.results import Cell, ResultFile
from trimkv_edge.evaluation.samples import Sample, SampleWriter
from trimkv_edge.evaluation.tasks import TASKS


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        tasks: names in ``TASKS``.
        lengths: tokens per stream.
        budgets: entries per head (int) or shares of the length (float), with the text each was given as.
        methods: what is compared.
        samples: streams per task and length.
        buffer: ring entries B of every method.
        seed: of the streams.

    Raises:
        ConfigError: a value is out of range.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[tuple[str, float | int], ...]
    methods: tuple[Method, ...]
    samples: int = 32
    buffer: int = 32
    seed: int = 0
    lookahead: int = 1

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"task {task!r} is not known; use some of {', '.join(TASKS)}")
        for name in ("samples", "buffer", "lookahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if min(self.lengths, default=0) < 2 or not (self.tasks and self.methods):
            raise ConfigError("give at least one task, one method and one length of 2 tokens or more")
        if not self.budgets and any(method.policy != "full" for method in self.methods):
            raise ConfigError("give at least one budget")

    def cells(self) -> list[tuple[str, int, Method, str, int | None]]:
        """(task, length, method, share, entries) of each cell; a budget that holds the whole stream is left out."""
        found: list[tuple[str, int, Method, str, int | None]] = []
        for task in self.tasks:
            for length in self.lengths:
                for method in self.methods:
                    if method.policy == "full":
                        found.append((task, length, method, "", None))
                        continue
                    for share, budget in self.budgets:
                        count = entries(budget, length)
                        if count + self.buffer <= length:
                            found.append((task, length, method, share, count))
        return found


@dataclass(frozen=True)
class Subject:
    """What is measured and how to open it.

    Attributes:
        model: name and hash that identify the weights.
        engine: what runs it.
        gates_of: hash of the gates a method uses.
        open: makes a reader for a method and its cache settings.
    """

    model: str
    engine: str
    gates_of: Callable[[Method], str]
    open: Callable[[Method, CacheConfig], Reader]


def run_sweep(
    sweep: Sweep,
    subject: Subject,
    writer: SampleWriter,
    results: ResultFile,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> list[Cell]:
    """Runs what ``results`` does not hold yet; returns all cells of the sweep.

    Args:
        report: called with one line per cell.
        progress: called with tokens read.

    Raises:
        ConfigError: a task does not fit a length.
    """
    cells = sweep.cells()
    done: list[Cell] = []
    samples: dict[tuple[str, int], list[Sample]] = {}
    for number, (task, length, method, share, budget) in enumerate(cells, 1):
        empty = Cell(
            task=task,
            unit=TASKS[task].unit,
            length=length,
            method=method.label,
            model=subject.model,
            gates=subject.gates_of(method),
            engine=subject.engine,
            budget=budget,
            share=share,
            buffer=sweep.buffer,
            seed=sweep.seed,
            lookahead=sweep.lookahead,
            streams=[{}] * sweep.samples,
            text_bytes=[],
            seconds=0.0,
        )
        cell = results.cells.get(empty.key)
        again = " (done before)" if cell else ""
        if cell is None:
            if (task, length) not in samples:
                made = [TASKS[task].sample(writer, length, sweep.seed, i) for i in range(sweep.samples)]
                samples = {(task, length): made}
            cell = _measure(empty, subject, method, samples[task, length], sweep, progress)
            results.add(cell)
        done.append(cell)
        budget_text = "all" if budget is None else f"{budget}+{sweep.buffer}"
        report(
            f"[{number}/{len(cells)}] {task:<14} {length:>6} tokens  {method.label:<14} {budget_text:>9}  "
            f"{cell.unit} {cell.interval()}  {cell.seconds:.0f} s{again}"
        )
    return done


def _measure(
    empty: Cell, subject: Subject, method: Method, samples: Sequence[Sample], sweep: Sweep, progress: Progress | None
) -> Cell:
    started = perf_counter()
    config = method.config(empty.length, empty.budget or empty.length, sweep.buffer, sweep.lookahead)
    scored = subject.open(method, config).score(samples, progress)
    streams: list[dict[str, list[float]]] = []
    for sample, (hit, nats) in zip(samples, scored, strict=True):
        values = nats if empty.unit == "nats" else hit
        stream: dict[str, list[float]] = {}
        for answer, value in zip(sample.answers, values.tolist(), strict=True):
            total = stream.setdefault(answer.group, [0.0, 0.0])
            total[0] += value
            total[1] += 1
        streams.append(stream)
    record = {**empty.__dict__, "streams": streams, "text_bytes": [sample.text_bytes for sample in samples]}
    return Cell(**{**record, "seconds": round(perf_counter() - started, 2)})
