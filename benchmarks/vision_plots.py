"""Draws what ``models/tiny_vl/evaluate.py`` measured: accuracy against budget, and what pictures hold of the cache.

python benchmarks/vision_plots.py                    # benchmarks/results/tiny_vl.json -> docs/vision/*.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODALITIES = ("picture", "text")
STYLES = {
    "global (rg10)": "o",
    "global (rg10-chat)": "v",
    "trimkv (rg10)": "s",
    "streaming": "x",
}


def accuracy(table: list[dict[str, Any]], path: Path) -> None:
    """A row of panels for each modality, a column for each length."""
    lengths = sorted({row["length"] for row in table})
    figure, axes = plt.subplots(2, len(lengths), figsize=(4.2 * len(lengths) + 1.4, 6.4), sharey=True, squeeze=False)
    for line, modality in zip(axes, MODALITIES, strict=True):
        for axis, length in zip(line, lengths, strict=True):
            here = [row for row in table if row["length"] == length]
            for method, marker in STYLES.items():
                rows = sorted((row for row in here if row["method"] == method), key=lambda row: int(row["budget"]))
                if not rows:
                    continue
                share = [row[modality]["right"] / row[modality]["asked"] for row in rows]
                axis.plot([row["budget"] for row in rows], share, marker=marker, label=method)
            full = next(row for row in here if row["method"] == "full cache")
            axis.axhline(full[modality]["right"] / full[modality]["asked"], color="black", ls="--", label="full cache")
            budgets = sorted({row["budget"] for row in here if "budget" in row})
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(budget) for budget in budgets])
            axis.set_title(f"questions about {modality}s" if modality == "picture" else "questions about stated facts")
            axis.set_xlabel(f"budget M, entries per KV head; streams of {length:,} tokens")
            axis.set_ylim(-0.03, 1.03)
        line[0].set_ylabel("answers right")
    axes[0][-1].legend(loc="lower right", fontsize="small")
    finish(figure, path)


def shares(table: list[dict[str, Any]], tokens: float, path: Path) -> None:
    """What share of the held entries are rows of pictures, along the longest streams; ``tokens``: of the stream."""
    length = max(row["length"] for row in table)
    here = [row for row in table if row["length"] == length and "budget" in row]
    budgets = sorted({row["budget"] for row in here})
    figure, axes = plt.subplots(1, len(budgets), figsize=(3.6 * len(budgets) + 1.4, 3.4), sharey=True, squeeze=False)
    for axis, budget in zip(axes[0], budgets, strict=True):
        for method, marker in STYLES.items():
            for row in here:
                if (row["method"], row["budget"]) == (method, budget):
                    points = row["picture_rows_held"]
                    axis.plot([p["tokens"] for p in points], [p["share"] for p in points], marker=marker, label=method)
        axis.axhline(tokens, color="black", ls=":", label="of the stream")
        axis.set_title(f"M = {budget}")
        axis.set_xlabel("tokens read")
    axes[0][0].set_ylabel("rows of pictures among held entries")
    axes[0][-1].legend(fontsize="small")
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    """Writes a plot; the same numbers give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print("wrote", path)


def main() -> None:
    """Command line entry."""
    root = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, default=root / "results" / "tiny_vl.json")
    parser.add_argument("--output", type=Path, default=root.parent / "docs" / "vision")
    args = parser.parse_args()
    found = json.loads(args.input.read_text(encoding="utf-8"))
    accuracy(found["table"], args.output / "accuracy.png")
    shares(found["table"], found["picture_rows_of_the_longest_streams"], args.output / "shares.png")


if __name__ == "__main__":
    main()
