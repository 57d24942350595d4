"""Plots of a sweep: accuracy against budget, and against context length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimkv_edge.evaluation.results import Cell

_FORMATS = ("png", "svg")


def plot_all(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Writes, per task, ``<task>_budget.{png,svg}`` (one panel per length) and ``<task>_length.{png,svg}`` (one panel
    per budget) where there is more than one length; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    # The same input gives the same bytes: a rerun leaves no change behind.
    matplotlib.rcParams["svg.hashsalt"] = "trimkv-edge"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in dict.fromkeys(cell.task for cell in cells):
        chosen = [cell for cell in cells if cell.task == task]
        files += _against_budget(task, chosen, folder)
        files += _against_length(task, chosen, folder)
    return files


def _against_budget(task: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    bounded = [cell for cell in cells if cell.budget is not None]
    lengths = sorted({cell.length for cell in bounded})
    if not lengths:
        return []
    figure, axes = _panels(len(lengths))
    for axis, length in zip(axes, lengths, strict=True):
        here = [cell for cell in bounded if cell.length == length]
        for method, style in _styles(cells).items():
            points = sorted(((c.budget or 0), c) for c in here if c.method == method)
            _line(axis, [x for x, _ in points], [c for _, c in points], method, style)
        for cell in cells:
            if cell.budget is None and cell.length == length:
                axis.axhline(cell.interval().mean, color="black", linestyle="--", label="full cache")
        axis.set_xscale("log", base=2)
        budgets = sorted({cell.budget or 0 for cell in here})
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.set_xlabel(f"budget M, entries per KV head (+ {here[0].buffer} new ones)")
        axis.set_title(f"{task}, {length:,} tokens")
    return _finish(figure, axes, cells[0].unit, folder / f"{_slug(task)}_budget")


def _against_length(task: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    shares = list(dict.fromkeys(cell.share for cell in cells if cell.budget is not None))
    if not shares or len({cell.length for cell in cells}) < 2:
        return []
    figure, axes = _panels(len(shares))
    for axis, share in zip(axes, shares, strict=True):
        for method, style in _styles(cells).items():
            points = sorted((c.length, c.method, c) for c in cells if c.method == method and c.share == share)
            _line(axis, [x for x, _, _ in points], [c for _, _, c in points], method, style)
        full = sorted((c.length, c.interval().mean) for c in cells if c.budget is None)
        if full:
            axis.plot(*zip(*full, strict=True), color="black", linestyle="--", label="full cache")
        axis.set_xscale("log", base=2)
        lengths = sorted({cell.length for cell in cells})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xlabel("stream length, tokens")
        axis.set_title(f"{task}, budget {share}")
    return _finish(figure, axes, cells[0].unit, folder / f"{_slug(task)}_length")


def _slug(task: str) -> str:
    return task.replace(" ", "-")


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(4.2 * count + 1.6, 3.6), sharey=True, squeeze=False)
    return figure, list(axes[0])


def _styles(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """A colour and marker per method, the same in every panel; learned policies are drawn thicker."""
    methods = dict.fromkeys(cell.method for cell in cells if cell.budget is not None)
    markers = "osD^v<>PX*"
    return {
        method: {
            "color": f"C{number % 10}",
            "marker": markers[number % len(markers)],
            "linewidth": 2.2 if method.startswith(("trimkv", "global")) else 1.0,
        }
        for number, method in enumerate(methods)
    }


def _line(axis: Any, x: Sequence[int], cells: Sequence[Cell], label: str, style: dict[str, Any]) -> None:
    if not cells:
        return
    intervals = [cell.interval() for cell in cells]
    axis.plot(x, [i.mean for i in intervals], label=label, markersize=4, **style)
    axis.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], color=style["color"], alpha=0.12)


def _finish(figure: Any, axes: Sequence[Any], unit: str, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    axes[0].set_ylabel("accuracy" if unit == "accuracy" else "nats per token")
    if unit == "accuracy":
        axes[0].set_ylim(-0.03, 1.03)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.tight_layout()
    files = [stem.with_name(f"{stem.name}.{form}") for form in _FORMATS]
    for path in files:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return files
