"""Every policy, written plainly from its paper: entries as Python objects, loops, float64. Nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oracle import oracle_score


@dataclass
class Seen:
    """One cached token of one head, with everything that happened to it."""

    position: int
    log_beta: float
    key: list[float]
    value: list[float]
    mass: float = 0.0
    # Attention of each later query of the group (query position -> one weight per query head).
    received: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class Settings:
    budget: int
    buffer: int
    sinks: int = 0
    recent: int = 0


Head = list[Seen]
# Scores of one head's entries, oldest first; None is "always kept". ``layer`` holds all heads of the layer.
Scorer = Callable[[Head, Sequence[Head], int, Settings], list[float | None]]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def trimkv(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    return [oracle_score(entry.log_beta, entry.position, seen) for entry in head]


def streaming(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    return [float(entry.position) for entry in head]


def h2o(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    recent = settings.budget // 2
    return [None if entry.position >= seen - recent else entry.mass for entry in head]


def tova(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    newest = seen - 1
    by_position: dict[int, list[float]] = {}
    # All heads of a layer hold the same positions, because they rank alike from the start.
    for other in layer:
        for entry in other:
            by_position.setdefault(entry.position, []).extend(entry.received[newest])
    return [None if entry.position == newest else mean(by_position[entry.position]) for entry in head]


def keydiff(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    units = [[x / math.sqrt(dot(entry.key, entry.key)) for x in entry.key] for entry in head]
    anchor = [mean(column) for column in zip(*units, strict=True)]
    return [-cosine(entry.key, anchor) for entry in head]


def window_attention(head: Head, seen: int, width: int) -> list[float]:
    """Mean attention of the newest ``width`` queries to each entry before them, oldest first."""
    queries = range(seen - width, seen)
    return [mean([mean(entry.received[q]) for q in queries]) for entry in head if entry.position < seen - width]


def neighbours(values: Sequence[float], at: int, kernel: int = 5) -> list[float]:
    return list(values[max(0, at - kernel // 2) : at + kernel // 2 + 1])


def snapkv(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    width = min(32, settings.buffer, max(1, settings.budget // 2))
    attention = window_attention(head, seen, width)
    # What lies past either end counts as 0, and the kernel always has five members.
    scores: list[float | None] = [sum(neighbours(attention, i)) / 5 for i in range(len(attention))]
    return scores + [None] * width


def r_kv(head: Head, layer: Sequence[Head], seen: int, settings: Settings) -> list[float | None]:
    width = min(8, settings.buffer, max(1, settings.budget // 2))
    older = [entry for entry in head if entry.position < seen - width]
    # The softmax is over the older entries alone.
    by_query = [[mean(entry.received[q]) for entry in older] for q in range(seen - width, seen)]
    attention = [mean([row[i] / sum(row) for row in by_query]) for i in range(len(older))]
    size = len(head)
    columns = [0.0] * size
    for i in range(size):
        alike = [0.0 if i == j else cosine(head[i].key, head[j].key) for j in range(size)]
        last = max([j for j in range(size) if alike[j] > 0.5], default=0)
        alike[last] = 0.0
        for j in range(size):
            columns[j] += alike[j] / size
    total = sum(math.exp(column) for column in columns)
    scores: list[float | None] = [
        0.1 * max(neighbours(attention, i, 7)) - 0.9 * math.exp(columns[i]) / total for i in range(len(attention))
    ]
    return scores + [None] * width


ORACLES: dict[str, Scorer] = {
    "trimkv": trimkv,
    "streaming": streaming,
    "h2o": h2o,
    "tova": tova,
    "keydiff": keydiff,
    "snapkv": snapkv,
    "r-kv": r_kv,
}


def ranking(head: Head, layer: Sequence[Head], policy: str, seen: int, settings: Settings) -> list[Seen]:
    """Entries of one head, first to leave first: by protection, what the policy always keeps, score and age."""
    entries = sorted(head, key=lambda entry: entry.position)

    def rank(pair: tuple[Seen, float | None]) -> tuple[bool, bool, float, int]:
        entry, score = pair
        protected = entry.position < settings.sinks or entry.position >= seen - settings.recent
        return protected, score is None, score or 0.0, entry.position

    scored = zip(entries, ORACLES[policy](entries, layer, seen, settings), strict=True)
    return [entry for entry, _ in sorted(scored, key=rank)]
