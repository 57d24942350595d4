"""The host of docs/npu.md in plain Python: what a port to another language does, without numpy and without the package.

Float32 arithmetic is double arithmetic rounded after each operation, as in JavaScript with ``Math.fround``.
"""

from __future__ import annotations

import math
import struct
from typing import Any

PROTECTED = 3.0e38


def f32(number: float) -> float:
    """The float32 nearest to a double."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def log_sigmoid(z: float) -> float:
    return f32(min(z, 0.0) - math.log1p(math.exp(-abs(z))))


def retention(log_beta: float, position: int, seen: int) -> float:
    return f32(log_beta * f32(seen + 1 - position))


def rotary(frequencies: list[float], scaling: float, position: int) -> tuple[list[float], list[float]]:
    angles = [f32(f32(position) * f32(frequency)) for frequency in frequencies] * 2
    return tuple([f32(f32(turn(angle)) * f32(scaling)) for angle in angles] for turn in (math.cos, math.sin))  # type: ignore[return-value]


def visible(slots: int, live: int, count: int, chunk: int) -> list[list[int]]:
    first = chunk - count
    return [[*range(live), *range(slots + first, slots + row + 1)] if row >= first else [] for row in range(chunk)]


def hashed(row: int, position: int) -> int:
    mixed = ((position + 1) * 48271 + (row + 1) * 1664525) % 2147483647
    mixed = (mixed * mixed + 69621) % 2147483647
    return (mixed * mixed + mixed) % 2147483647 % 16777216


class PlainHost:
    """One stream of ``vectors.json``; a head is a list of ``[position, log_beta]``, its index the slot."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.seen = case, 0
        self.heads: list[list[tuple[int, float]]] = [[] for _ in range(case["layers"] * case["kv_heads"])]

    def positions(self) -> list[list[list[int]]]:
        rows = [[position for position, _ in head] for head in self.heads]
        width = self.case["kv_heads"]
        return [rows[first : first + width] for first in range(0, len(rows), width)]

    def append(self, gate_logits: list[list[list[float]]]) -> None:
        for token in gate_logits:
            for head, logit in zip(self.heads, [z for layer in token for z in layer], strict=True):
                head.append((self.seen, log_sigmoid(logit)))
            self.seen += 1

    def full(self) -> bool:
        return len(self.heads[0]) == self.case["budget"] + self.case["buffer"]

    def evict(self) -> int:
        budget, moved = self.case["budget"], 0
        for row, head in enumerate(self.heads):
            ranked = sorted(range(len(head)), key=lambda slot: (self.score(row, *head[slot]), head[slot][0]))
            leaving = set(ranked[: self.case["buffer"]])
            holes = [slot for slot in range(budget) if slot in leaving]
            movers = [slot for slot in range(budget, len(head)) if slot not in leaving]
            for hole, mover in zip(holes, movers, strict=True):
                head[hole] = head[mover]
            del head[budget:]
            moved += len(holes)
        return moved

    def score(self, row: int, position: int, log_beta: float) -> float:
        if position < self.case["sinks"] or position >= self.seen - self.case["recent"]:
            return PROTECTED
        if self.case["policy"] == "trimkv":
            return retention(log_beta, position, self.seen)
        return position if self.case["policy"] == "streaming" else hashed(row, position)
