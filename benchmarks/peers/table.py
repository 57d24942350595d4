"""From samples to the table: medians, ratios taken within a turn, and what a row says when there is no number."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

# Least cosine of the logits. 4 bits hold Gaussian weights badly, the more layers the worse; for other weights the
# cosine is within 1 / sqrt(hidden size), 0.03, of 0.
_FLOAT32, _BFLOAT16, _QUANTISED = 0.9999, 0.99, 0.3


def step_ms(windows: Sequence[Sequence[float]], events: Sequence[float], steps_per_event: int | None) -> list[float]:
    """Milliseconds of a decode step in each window: its median step, and the share of an event that a step pays for.

    Args:
        windows: seconds of the steps in each turn.
        events: seconds of the eviction events so far; none: the cache was not full yet, or never is.
        steps_per_event: steps from one event to the next.
    """
    share = median(events) / steps_per_event if events and steps_per_event else 0.0
    return [(median(window) + share) * 1e3 for window in windows]


def ratio(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Median of ``values[i] / reference[i]``; both were measured in turn ``i``. None if the turns are not the same."""
    if not values or len(values) != len(reference):
        return None
    return median(value / other for value, other in zip(values, reference, strict=True))


def agreement(logits: Sequence[float], greedy: Sequence[int], reference: dict[str, Any]) -> dict[str, float]:
    """Cosine of the logits to the reference's, the largest difference, and how far the greedy tokens are the same."""
    ours, theirs = np.asarray(logits, np.float64), np.asarray(reference["logits"], np.float64)
    cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
    same = next((i for i, (a, b) in enumerate(zip(greedy, reference["greedy"], strict=True)) if a != b), len(greedy))
    return {"cosine": cosine, "max_difference": float(np.abs(ours - theirs).max()), "same_greedy": same}


def problem(check: dict[str, float], weights: str, reference: str) -> str:
    """Why the logits show that these are not the same weights; empty if they are.

    Args:
        check: from :func:`agreement`.
        weights, reference: data types of the peer's weights and of what transformers computed the reference in.
    """
    if {weights, reference} <= {"float32", "bfloat16"}:
        least = _FLOAT32 if weights == reference == "float32" else _BFLOAT16
    else:
        least = _QUANTISED
    if not check["cosine"] >= least:
        return f"logits have a cosine of {check['cosine']:.4f} to transformers', at least {least} was expected"
    return ""


def render(rows: dict[str, dict[str, Any]], contexts: Sequence[int]) -> str:
    """Two Markdown tables: decode and prefill; a row without measurements says why."""
    head = ["peer", "weights", "cache", "file MiB", "load s", "peak MiB", "cosine"]
    decode = [[*head, *(f"{c:,}" for c in contexts)]]
    prefill = [["peer", *(f"{c:,}" for c in contexts)]]
    notes = []
    for name, row in rows.items():
        if row.get("missing"):
            notes.append(f"- {name}: {row['missing']}")
        if "contexts" not in row:
            decode.append([name, *["-"] * (len(decode[0]) - 1)])
            continue
        about = [row["weights"], row["cache"], f"{row['file_bytes'] / 2**20:.0f}", f"{row['load_s']:.1f}"]
        about += [f"{row.get('peak_rss', 0) / 2**20:.0f}", f"{row['check']['cosine']:.4f}" if row.get("check") else "-"]
        cells = [row["contexts"].get(str(c), {}) for c in contexts]
        decode.append([name, *about, *(_cell(cell, "decode_ms", "decode_ratio", ".2f") for cell in cells)])
        prefill.append([name, *(_cell(cell, "prefill_tokens_per_s", "prefill_ratio", ",.0f") for cell in cells)])
    parts = ["Decode, ms per token at each context (ratio to ours)", _markdown(decode)]
    parts += ["Prefill, tokens per second up to each context (ratio to ours)", _markdown(prefill)]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def _cell(cell: dict[str, Any], value: str, quotient: str, form: str) -> str:
    if value not in cell:
        return "-"
    text = format(cell[value], form)
    return text if cell.get(quotient) is None else f"{text} ({cell[quotient]:.2f})"


def _markdown(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
