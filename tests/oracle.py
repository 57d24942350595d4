"""The bounded cache, written as plainly as possible from the contract (docs/design.md, "Exact semantics").

One entry at a time, Python lists, no tensors. numpy scalars appear only where the contract rounds: scores are float32.
Nothing here imports the package, so a test that compares with it compares with the contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Entry:
    """One cached token of one head."""

    position: int
    log_beta: float
    key: Any = None
    value: Any = None


def oracle_score(log_beta: float, position: int, seen: int, lookahead: int = 1) -> float:
    """Score of one entry when ``seen`` tokens have been read, as a Python float holding a float32 value.

    ``lookahead > 1`` scores the sum of the retentions over the next ``lookahead`` steps, term by term in float64.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if lookahead == 1:
            age = seen + 1 - position
            return float(np.float32(log_beta) * np.float32(age))
        age = seen + 2 - position
        exponents = [(age + step) * float(np.float32(log_beta)) for step in range(lookahead)]
        total = sum(math.exp(exponent - exponents[0]) for exponent in exponents)
        return float(np.float32(exponents[0] + math.log(total)))


class OracleCache:
    """What every head of every layer must hold, for one sequence."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        budget: int,
        buffer: int,
        sinks: int = 0,
        recent: int = 0,
        lookahead: int = 1,
        policy: str = "trimkv",
        min_per_head: int = 0,
        threshold: float = 0.0,
        caps: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if policy not in ("trimkv", "global", "layer"):
            raise ValueError(policy)
        self.budget, self.buffer = budget, buffer
        self.sinks, self.recent, self.lookahead = sinks, recent, lookahead
        self.policy, self.min_per_head = policy, min_per_head
        self.threshold, self.caps = threshold, caps
        self.heads: dict[tuple[int, int], list[Entry]] = {
            (layer, head): [] for layer in range(num_layers) for head in range(num_kv_heads)
        }
        self.events = 0

    def append(self, layer: int, head: int, position: int, log_beta: float, key: Any = None, value: Any = None) -> None:
        """Add one new token to one head."""
        self.heads[layer, head].append(Entry(position, log_beta, key, value))

    def room(self) -> int:
        """Tokens that may be added to every head before the next event."""
        full = self.budget + self.buffer
        if self.policy == "trimkv":
            return full - max(len(entries) for entries in self.heads.values())
        return full - sum(len(entries) for entries in self.heads.values()) // len(self.heads)

    def end_step(self, seen: int) -> bool:
        """After a step: run the eviction event if the cache is full; says whether it ran."""
        if self.policy == "trimkv":
            full = [where for where, entries in self.heads.items() if len(entries) >= self.budget + self.buffer]
            for where in full:
                self._keep_best([where], self.budget, 0, seen)
            ran = bool(full)
        elif self.caps is not None or self.threshold:
            ran = seen > 0 and (seen - self.budget) % self.buffer == 0
            if ran:
                self._drop_early(seen)
                self._share(seen)
        else:
            held = sum(len(entries) for entries in self.heads.values())
            ran = held >= (self.budget + self.buffer) * len(self.heads)
            if ran:
                self._share(seen)
        self.events += ran
        return ran

    def _drop_early(self, seen: int) -> None:
        """What leaves a head whatever the others hold: what is above its cap, then what is below the threshold."""
        for (layer, head), held in self.heads.items():
            ranking = sorted(self._rank(entry, seen) for entry in held)
            if self.caps is not None:
                ranking = ranking[max(0, len(ranking) - self.caps[layer][head]) :]
            if self.threshold:
                low = np.float32(math.log(self.threshold))
                safe = ranking[max(0, len(ranking) - self.min_per_head) :]
                ranking = [item for item in ranking if item[0] or item[1] >= low or item in safe]
            stay = {position for _, _, position in ranking}
            self.heads[layer, head] = [entry for entry in held if entry.position in stay]

    def _share(self, seen: int) -> None:
        """The shared budget: of all layers and heads, or of each layer's heads."""
        layers = sorted({layer for layer, _ in self.heads})
        groups = [[where for where in self.heads if where[0] == layer] for layer in layers]
        for group in groups if self.policy == "layer" else [list(self.heads)]:
            self._keep_best(group, self.budget * len(group), self.min_per_head, seen)

    def _rank(self, entry: Entry, seen: int) -> tuple[bool, float, int]:
        """Lowest leaves first: not protected, low score, old."""
        protected = entry.position < self.sinks or entry.position >= seen - self.recent
        return protected, oracle_score(entry.log_beta, entry.position, seen, self.lookahead), entry.position

    def _keep_best(self, group: list[tuple[int, int]], keep: int, floor: int, seen: int) -> None:
        """Remove the lowest-scoring entries of ``group``, one at a time, until ``keep`` are left."""
        ranking = sorted((*self._rank(entry, seen), where) for where in group for entry in self.heads[where])
        held = len(ranking)
        for _, _, position, where in ranking:
            if held <= keep:
                return
            if len(self.heads[where]) > floor:
                self.heads[where] = [entry for entry in self.heads[where] if entry.position != position]
                held -= 1

    def entries(self, layer: int, head: int) -> list[Entry]:
        """Entries of one head, oldest first."""
        return sorted(self.heads[layer, head], key=lambda entry: entry.position)

    def positions(self, layer: int, head: int) -> list[int]:
        """Positions of one head, oldest first."""
        return [entry.position for entry in self.entries(layer, head)]

    def attend(
        self, layer: int, head: int, query: Sequence[float], scale: float, up_to: int | None = None
    ) -> list[float]:
        """Softmax attention in float64 over one head's entries (those at positions ``<= up_to``, if given)."""
        entries = [entry for entry in self.entries(layer, head) if up_to is None or entry.position <= up_to]
        q = [float(x) for x in query]
        logits = [scale * sum(a * float(b) for a, b in zip(q, entry.key, strict=True)) for entry in entries]
        if not logits:
            return [0.0] * len(q)
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        total = sum(weights)
        return [
            sum(weight * float(entry.value[i]) for weight, entry in zip(weights, entries, strict=True)) / total
            for i in range(len(entries[0].value))
        ]
