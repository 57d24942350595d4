"""A sweep's cells as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.results import Cell
from trimkv_edge.evaluation.statistics import Interval, paired

T = TypeVar("T")
ALL_TASKS = "all questions"


def tables(cells: Sequence[Cell]) -> str:
    """One table per task: a row per length and method, a column per budget; groups of answers as further rows."""
    parts = []
    for task in _unique(cell.task for cell in cells):
        chosen = [cell for cell in cells if cell.task == task]
        parts.append(f"### {task}\n\n{_table(chosen)}")
    return "\n".join(parts)


def pooled(cells: Sequence[Cell]) -> list[Cell]:
    """All questions of all tasks together, per length, method and budget; and the cells themselves.

    Only tasks that a bounded cache was measured on count, so that every method answers the same questions.
    """
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    counted = {(cell.task, cell.length) for cell in cells if cell.budget is not None and cell.unit == "accuracy"}
    for cell in cells:
        if (cell.task, cell.length) in counted:
            groups.setdefault((cell.length, cell.method, cell.share), []).append(cell)
    together = []
    for parts in groups.values():
        if len(parts) > 1:
            streams = [{"": [a, b]} for part in parts for a, b in zip(*part.totals(), strict=True)]
            together.append(replace(parts[0], task=ALL_TASKS, streams=streams, text_bytes=[]))
    return [*together, *cells]


def comparison(cells: Sequence[Cell], first: str, second: str) -> str:
    """Paired differences ``first - second`` over the same streams, per task, length and budget.

    Raises:
        ConfigError: a method was not measured, or never beside the other.
    """
    found = {cell.method for cell in cells}
    for name in (first, second):
        if name not in found:
            raise ConfigError(f"method {name!r} is not in these results; they hold {', '.join(sorted(found))}")
    lines = [f"| task | length | budget | {first} | {second} | difference | |", "|---|---|---|---|---|---|---|"]
    for left in cells:
        if left.method != first:
            continue
        for right in cells:
            if right.method == second and _comparable(left, right):
                gap = paired(left.totals()[0], right.totals()[0], left.totals()[1])
                budget = left.share or right.share or "all"
                lines.append(
                    f"| {left.task} | {left.length:,} | {budget} | {left.interval().mean:.3f} | "
                    f"{right.interval().mean:.3f} | {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] | "
                    f"{verdict(gap, left.unit)} |"
                )
    if len(lines) == 2:
        raise ConfigError(f"{first} and {second} share no task, length and budget in these results")
    return "\n".join(lines) + "\n"


def against_all(cells: Sequence[Cell], method: str) -> str:
    """``method`` against the best of the others at equal budget, and against the full cache, paired, one row per task,
    length and budget.

    Raises:
        ConfigError: the method was not measured.
    """
    own = [cell for cell in cells if cell.method == method and cell.budget is not None]
    if not own:
        found = sorted({cell.method for cell in cells if cell.budget is not None})
        raise ConfigError(f"method {method!r} has no bounded cells here; use one of {', '.join(found)}")
    # Other gates of the same policy are no baselines.
    policy = method.partition(":")[0]
    lines = [
        f"| task | length | budget | {method} | best other | difference | | full cache | difference | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in own:
        beside = [other for other in cells if _comparable(cell, other) and other.method.partition(":")[0] != policy]
        sign = 1 if cell.unit == "accuracy" else -1
        baselines = [other for other in beside if other.budget is not None]
        full = [other for other in beside if other.budget is None]
        columns = [cell.task, f"{cell.length:,}", cell.share, f"{cell.interval().mean:.3f}"]
        for others, name in ((baselines, True), (full, False)):
            if not others:
                columns += ["", "", ""]
                continue
            best = max(others, key=lambda other: sign * other.interval().mean)
            gap = paired(cell.totals()[0], best.totals()[0], cell.totals()[1])
            columns += [
                f"{best.method} {best.interval().mean:.3f}" if name else f"{best.interval().mean:.3f}",
                f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]",
                verdict(gap, cell.unit),
            ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def verdict(gap: Interval, unit: str) -> str:
    """Which way an interval of differences points; lower is better for nats."""
    if gap.low <= 0 <= gap.high:
        return "no difference seen"
    return "better" if (gap.mean > 0) == (unit == "accuracy") else "worse"


def _comparable(left: Cell, right: Cell) -> bool:
    same = (left.task, left.length, left.seed, left.model, len(left.streams))
    if same != (right.task, right.length, right.seed, right.model, len(right.streams)):
        return False
    return left.budget == right.budget or None in (left.budget, right.budget)


def _table(cells: Sequence[Cell]) -> str:
    budgets = _unique(cell.share for cell in cells if cell.budget is not None)
    unit = "accuracy" if cells[0].unit == "accuracy" else "nats per token (lower is better)"
    lines = [
        f"{unit}, 95 % interval over {_stream_counts(cells)} streams",
        "",
        f"| length | method | {' | '.join(budgets) if budgets else 'cache'} |",
        f"|---|---|{'---|' * max(1, len(budgets))}",
    ]
    for length in _unique(cell.length for cell in cells):
        for method in _unique(cell.method for cell in cells if cell.length == length):
            row = [cell for cell in cells if (cell.length, cell.method) == (length, method)]
            lines.append(_row(f"{length:,}", method, row, budgets, None))
            for group in row[0].groups:
                lines.append(_row("", f"- {group}", row, budgets, group))
    return "\n".join(lines) + "\n"


def _stream_counts(cells: Sequence[Cell]) -> str:
    counts = {cell.length: len(cell.streams) for cell in cells}
    if len(set(counts.values())) == 1:
        return str(len(cells[0].streams))
    return ", ".join(f"{count} ({length:,} tokens)" for length, count in counts.items())


def _row(length: str, method: str, row: Sequence[Cell], budgets: Sequence[str], group: str | None) -> str:
    by_share = {cell.share: cell for cell in row}
    if row[0].budget is None:
        texts = [_text(row[0], group), *[""] * (len(budgets) - 1)]
    else:
        texts = [_text(by_share[share], group) if share in by_share else "" for share in budgets]
    return f"| {length} | {method} | {' | '.join(texts)} |"


def _text(cell: Cell, group: str | None) -> str:
    interval = cell.interval(group)
    held = "" if cell.budget is None or group else f" ({cell.budget}+{cell.buffer})"
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]{held}"


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
