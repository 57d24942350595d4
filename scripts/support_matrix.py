"""Writes the tables that are made from the registry of targets and from measurements.

python scripts/support_matrix.py          # README.md: what is supported; docs/npu.md: all engines on one stream

Each table lies between two comments that name it. Tests compare them with what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimkv_edge.export.backends import BACKENDS, HOSTS, UNSUPPORTED, Ran
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.files import replace_text
from trimkv_edge.runtime.engines import ENGINES, RUNS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Survivors of ``(target, precision)``, as a share.
Survivors = dict[tuple[str, str], float]
FOLDER = "artefacts/tiny"


def results(name: str) -> Any:
    """What a benchmark stored."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def survivors(accuracy: list[dict[str, Any]], agreement: list[dict[str, Any]]) -> Survivors:
    """The best of each target and precision, every engine following its own past.

    Args:
        accuracy: rows of ``npu_accuracy.json``; they come first.
        agreement: rows of ``engines_agree.json``.
    """
    found: Survivors = {}
    others: Survivors = {}
    for row in accuracy:
        key = (row["target"], row["precision"])
        found[key] = max(found.get(key, 0.0), row["survivors_own"])
    for row in agreement:
        # What examples/web runs has a line of its own.
        key = ("web" if row["engine"] in ("node", "chromium") else row["target"], row["precision"])
        others[key] = max(others.get(key, 0.0), row["survivors_same"] / row["survivors"])
    return others | found


def percent(share: float) -> str:
    """Two digits; only what is exactly all is 100."""
    return "100" if share == 1 else f"{min(100 * share, 99.99):.2f}"


def matrix(kept: Survivors) -> str:
    """One line for each target and for each other host of its files."""
    lines = [
        "| target | for | precisions or operators: survivors, % | compiled | left to the CPU | runs here in "
        "| on its device | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, spec in TARGETS.items():
        backend = BACKENDS.get(name)
        graph = ("whole", backend.left) if backend else ("-", "-")
        lines.append(_line(name, spec.ops, kept, graph, spec.ran, command(name)))
        for other, host in HOSTS.items():
            if host.target == name:
                lines.append(
                    _line(other, spec.ops, kept, ("-", "-"), host.ran, f"{command(name, run=False)} && {host.command}")
                )
    return "\n".join(lines)


def command(name: str, run: bool = True) -> str:
    """Makes a target, and with ``run`` runs it if an engine can."""
    made = f"trimkv-export --model tiny --target {name} -o {FOLDER}"
    engines = [engine for engine in ENGINES if run and RUNS.get(engine, engine) == name]
    return made + "".join(f" && trimkv-run {FOLDER} --engine {engine} --prompt-file long.txt" for engine in engines)


def _line(name: str, ops: tuple[str, ...], kept: Survivors, graph: tuple[str, str], ran: Ran, does: str) -> str:
    measured = ", ".join(f"`{op}` " + (percent(kept[name, op]) if (name, op) in kept else "-") for op in ops)
    here = f"simulated: {ran.here}" if ran.simulates else ran.here or "-"
    return (
        f"| {' | '.join([f'`{name}`', ran.made_for, measured, *graph, here, ran.device or '**never**', f'`{does}`'])} |"
    )


def unsupported() -> str:
    """Names that have no compiler here."""
    return f"Not compiled here, and the export says why: {', '.join(f'`{name}`' for name in UNSUPPORTED)}."


def agreement(found: dict[str, Any]) -> str:
    """One line for each engine that read the stream of ``engines_agree.py``, after the reference's."""
    lines = [
        "| engine | target, precision | survivors | greedy tokens | versions |",
        "|---|---|---|---|---|",
        f"| eager, CPU | the float32 model | reference | reference | torch {found['reference']['torch']} |",
    ]
    for row in found["rows"]:
        same = f"{_share(row, 'survivors')} | {_share(row, 'greedy')}"
        used = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        lines.append(f"| {row['where']} | `{row['target']}`, `{row['precision']}` | {same} | {used} |")
    return "\n".join(lines)


def agreement_in_short(found: dict[str, Any]) -> str:
    """One sentence about :func:`agreement`."""
    rows = found["rows"]
    same = [row for row in rows if all(row[what] == row[f"{what}_same"] for what in ("survivors", "greedy"))]
    told = (
        f"Over one stream of {found['reference']['tokens']:,} tokens and {found['reference']['events']} events, "
        f"{len(same)} of {len(rows)} engines keep all entries and choose all tokens that the eager float32 model does"
    )
    if len(same) < len(rows):
        last = min(rows, key=lambda row: row["survivors_same"] / row["survivors"])
        told += (
            f"; the furthest, {last['where']} with `{last['precision']}`, shares "
            f"{percent(last['survivors_same'] / last['survivors'])} % of the entries and "
            f"{percent(last['greedy_same'] / last['greedy'])} % of the tokens"
        )
    return f"{told} ([table](docs/npu.md#all-engines-on-one-stream))."


def _share(row: dict[str, Any], what: str) -> str:
    same, total = row[f"{what}_same"], row[what]
    return f"all {total:,}" if same == total else f"{same:,} of {total:,} ({percent(same / total)} %)"


def with_table(text: str, name: str, table: str) -> str:
    """``text`` with what lies between the comments ``name`` replaced.

    Raises:
        ValueError: the comments are not there once each, in order.
    """
    begin, end = f"<!-- {name}: made by scripts/support_matrix.py -->\n\n", f"\n\n<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the comments around the table {name!r} are not there once each")
    return text[: text.index(begin) + len(begin)] + table + text[text.index(end) :]


def written() -> dict[Path, str]:
    """Text of each file that has a table, as it has to be."""
    agreed = results("engines_agree")
    lines = matrix(survivors(results("npu_accuracy"), agreed["rows"]))
    tables = {
        ROOT / "README.md": ("targets", f"{lines}\n\n{agreement_in_short(agreed)}\n{unsupported()}"),
        ROOT / "docs" / "npu.md": ("engines", agreement(agreed)),
    }
    return {path: with_table(path.read_text(encoding="utf-8"), *table) for path, table in tables.items()}


def main() -> None:
    for path, text in written().items():
        replace_text(path, text)


if __name__ == "__main__":
    main()
