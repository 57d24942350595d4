"""Sweeps: which cells run, what is stored, how an interrupted sweep goes on, tables and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.methods import Method, entries, parse_share
from trimkv_edge.evaluation.plots import plot_all
from trimkv_edge.evaluation.report import against_all, comparison, pooled, tables
from trimkv_edge.evaluation.results import Cell, ResultFile
from trimkv_edge.evaluation.samples import SampleWriter
from trimkv_edge.evaluation.sweep import Subject, Sweep, run_sweep
from trimkv_edge.evaluation.words import WORDS
from trimkv_edge.models.source import TINY


class Scripted:
    """Answers a fixed share of the questions, by position in the stream: what a reader would say, made up."""

    def __init__(self, share: float, log: list[CacheConfig], config: CacheConfig) -> None:
        self.share = share
        log.append(config)

    def score(self, samples, progress=None):
        out = []
        for sample in samples:
            count = len(sample.answers)
            out.append((np.arange(count) < round(self.share * count), np.full(count, 2.0)))
        return out


def subject(log: list[CacheConfig]) -> Subject:
    shares = {"full": 1.0, "trimkv": 0.75, "streaming": 0.25}
    return Subject("model abc", "eager", lambda m: m.gates or "", lambda m, c: Scripted(shares[m.policy], log, c))


def writer() -> SampleWriter:
    return SampleWriter(TINY / "weights", WORDS, ["x = 1\n" * 300])


METHODS = tuple(Method.parse(text) for text in ("full", "trimkv:rg", "streaming"))
SWEEP = Sweep(("multi-query", "text"), (512, 1024), (("25%", 0.25), ("64", 64)), METHODS, samples=4)


def test_cells_and_their_settings(tmp_path: Path) -> None:
    log: list[CacheConfig] = []
    cells = run_sweep(SWEEP, subject(log), writer(), ResultFile(tmp_path), lambda line: None)
    assert len(cells) == 2 * 2 * (1 + 2 * 2)
    assert log[:5] == [
        CacheConfig(512, 32, 32, "full"),
        CacheConfig(128, 32, 32, "trimkv"),
        CacheConfig(64, 32, 32, "trimkv"),
        CacheConfig(128, 32, 32, "streaming", sinks=4),
        CacheConfig(64, 32, 32, "streaming", sinks=4),
    ]
    first, second = cells[0], cells[1]
    assert (first.method, first.budget, first.interval().mean) == ("full", None, 1.0)
    assert (second.method, second.budget, second.share, second.interval().mean) == ("trimkv:rg", 128, "25%", 0.75)
    text = next(cell for cell in cells if cell.task == "text")
    assert text.interval().mean == pytest.approx(2.0)
    assert text.bits_per_byte == pytest.approx(2.0 * 4 * 511 / np.log(2) / sum(text.text_bytes))


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop_after_three(line: str) -> None:
        if line.startswith("[3/"):
            raise Killed

    with pytest.raises(Killed):
        run_sweep(SWEEP, subject([]), writer(), ResultFile(tmp_path), stop_after_three)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"task": "multi-que')  # what a kill leaves in the middle of a write
    log: list[CacheConfig] = []
    lines: list[str] = []
    cells = run_sweep(SWEEP, subject(log), writer(), ResultFile(tmp_path), lines.append)
    assert len(cells) == 20
    assert len(log) == 17
    assert [line.endswith("(done before)") for line in lines] == [True] * 3 + [False] * 17
    again = ResultFile(tmp_path)
    assert list(again.cells.values()) == cells


def test_other_gates_or_samples_are_other_cells(tmp_path: Path) -> None:
    results = ResultFile(tmp_path)
    small = Sweep(("single",), (512,), (("64", 64),), (Method("trimkv", "rg"),), samples=2)
    for gates, count in (("aaa", 1), ("aaa", 0), ("bbb", 1)):
        log: list[CacheConfig] = []
        run_sweep(
            small, Subject("m", "eager", lambda m, g=gates: g, subject(log).open), writer(), results, lambda _: None
        )
        assert len(log) == count


def test_reports_show_the_newest_gates(tmp_path: Path) -> None:
    results = ResultFile(tmp_path)
    old, new = cell("trimkv:rg", 128, [1.0, 1.0]), cell("trimkv:rg", 128, [2.0, 2.0])
    for one in (replace(old, gates="aaa"), cell("full", None, [2.0, 2.0]), replace(new, gates="bbb")):
        results.add(one)
    assert [(one.method, one.gates) for one in ResultFile(tmp_path).newest()] == [("full", ""), ("trimkv:rg", "bbb")]


def test_a_damaged_line_in_the_middle(tmp_path: Path) -> None:
    run_sweep(SWEEP, subject([]), writer(), ResultFile(tmp_path), lambda line: None)
    path = tmp_path / "cells.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]))
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        ResultFile(tmp_path)


def cell(method: str, budget: int | None, hits: list[float]) -> Cell:
    streams = [{"updated": [h, 2.0], "kept": [1.0, 2.0]} for h in hits]
    share = "" if budget is None else "25%"
    return Cell(
        "updates", "accuracy", 512, method, "m", "", "eager", budget, share, 32, 0, 1, streams, [0] * len(hits), 1.0
    )


def test_table_by_hand() -> None:
    text = tables([cell("full", None, [2.0, 2.0]), cell("trimkv:rg", 128, [2.0, 0.0])])
    assert text.splitlines() == [
        "### updates",
        "",
        "accuracy, 95 % interval over 2 streams",
        "",
        "| length | method | 25% |",
        "|---|---|---|",
        "| 512 | full | 0.750 [0.75, 0.75] |",
        "|  | - kept | 0.500 [0.50, 0.50] |",
        "|  | - updated | 1.000 [1.00, 1.00] |",
        "| 512 | trimkv:rg | 0.500 [0.25, 0.75] (128+32) |",
        "|  | - kept | 0.500 [0.50, 0.50] |",
        "|  | - updated | 0.500 [0.00, 1.00] |",
    ]


def test_paired_comparison() -> None:
    cells = [cell("full", None, [2.0] * 20), cell("a", 128, [2.0, 1.0] * 10), cell("b", 128, [0.0] * 20)]
    lines = comparison(cells, "a", "b").splitlines()
    assert lines[2] == "| updates | 512 | 25% | 0.625 | 0.250 | +0.375 [+0.325, +0.425] | better |"
    assert comparison(cells, "b", "full").splitlines()[2].endswith("| worse |")
    assert comparison(cells, "a", "a").splitlines()[2].endswith("| no difference seen |")
    with pytest.raises(ConfigError, match=r"'c' is not in these results; they hold a, b, full"):
        comparison(cells, "a", "c")


def test_against_the_best_other_method() -> None:
    cells = [
        cell("full", None, [2.0] * 20),
        cell("trimkv:rg", 128, [2.0, 1.0] * 10),
        cell("trimkv:rg10", 128, [2.0] * 20),
        cell("a", 128, [0.0] * 20),
        cell("b", 128, [1.0] * 20),
    ]
    row = against_all(cells, "trimkv:rg").splitlines()[2]
    assert row == (
        "| updates | 512 | 25% | 0.625 | b 0.500 | +0.125 [+0.075, +0.175] | better "
        "| 0.750 | -0.125 [-0.175, -0.075] | worse |"
    )
    with pytest.raises(ConfigError, match="use one of a, b, trimkv:rg, trimkv:rg10"):
        against_all(cells, "full")


def test_all_questions_together() -> None:
    """Streams of both tasks count; a task that only the full cache answered does not."""
    cells = [cell("full", None, [2.0] * 4), cell("a", 128, [1.0] * 4)]
    cells += [replace(one, task="qa", streams=[{"": [1.0, 4.0]}] * 2) for one in cells]
    cells.append(replace(cells[0], task="variables"))
    found = {one.method: one for one in pooled(cells) if one.task == "all questions"}
    assert found["full"].interval().mean == pytest.approx((4 * 3 + 2 * 1) / (4 * 4 + 2 * 4))
    assert found["a"].interval().mean == pytest.approx((4 * 2 + 2 * 1) / (4 * 4 + 2 * 4))
    assert len(found["a"].streams) == 6
    assert pooled(cells)[2:] == cells
    assert pooled(cells[:2]) == cells[:2]


def test_plots_are_written_and_repeatable(tmp_path: Path) -> None:
    cells = run_sweep(SWEEP, subject([]), writer(), ResultFile(tmp_path), lambda line: None)
    files = plot_all(cells, tmp_path / "one")
    assert sorted(path.name for path in files) == sorted(
        f"{task}_{kind}.{form}"
        for task in ("multi-query", "text")
        for kind in ("budget", "length")
        for form in ("png", "svg")
    )
    assert all(path.stat().st_size > 5000 for path in files)
    svg = (tmp_path / "one" / "multi-query_budget.svg").read_text()
    plot_all(cells, tmp_path / "two")
    assert (tmp_path / "two" / "multi-query_budget.svg").read_text() == svg


@pytest.mark.parametrize(
    ("text", "length", "want"), [("25%", 1000, 256), ("6.25%", 512, 32), ("12.5%", 4096, 512), ("77", 512, 77)]
)
def test_budgets(text: str, length: int, want: int) -> None:
    assert entries(parse_share(text), length) == want


@pytest.mark.parametrize("text", ["0", "-3", "x", "0%", "101%", "", "%"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(ConfigError, match=r"12\.5%"):
        parse_share(text)


def test_budgets_that_hold_the_stream_are_left_out() -> None:
    sweep = Sweep(("single",), (128, 512), (("112", 112),), (Method("trimkv"),))
    assert [(length, budget) for _, length, _, _, budget in sweep.cells()] == [(512, 112)]


@pytest.mark.parametrize(
    "change",
    [{"tasks": ("nothing",)}, {"samples": 0}, {"lengths": ()}, {"budgets": ()}, {"methods": ()}, {"lengths": (1,)}],
)
def test_wrong_sweeps(change: dict) -> None:
    settings = {"tasks": ("single",), "lengths": (512,), "budgets": (("64", 64),), "methods": METHODS, **change}
    with pytest.raises(ConfigError):
        Sweep(**settings)


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match=r"'newest'.*trimkv"):
        Method.parse("newest:rg")
