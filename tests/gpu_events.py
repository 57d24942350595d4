"""Full caches at an eviction event, and what must be in them afterwards, from the oracle of Python lists."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import OracleCache
from torch import Tensor

F32 = np.float32
# Where kernels are checked (tests/gpu/kernels).
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu"
# How log-betas are made: all different, of few levels, extreme, zeros of both signs, or such that all scores are near
# each other.
KINDS = ("plain", "levels", "special", "zeros", "flat")
SPECIAL = np.array([0.0, -0.0, -1e38, -3.4e38, -1e-38, -1e-45, -7e-45, -1e-7, -0.5], F32)


@dataclass
class Event:
    """Arguments of ``trimkv::evict``; ``tables`` are key, value, log_beta, positions."""

    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    seen: Tensor
    due: Tensor
    budget: int
    sinks: int
    recent: int

    def check(self, evict: Callable[..., object], device: str = "cpu") -> None:
        """Runs the event and compares every slot, those that nothing may touch included."""
        *tables, seen, due = (part.to(device).clone() for part in (*self.tables, self.seen, self.due))
        evict(*tables, seen, due, self.budget, self.sinks, self.recent)
        for name, got, want in zip(("key", "value", "log_beta", "positions"), tables, expected(self), strict=True):
            assert torch.equal(got.cpu(), want), name


def event(
    shape: tuple[int, int, int, int],
    budget: int,
    buffer: int,
    seed: int,
    kind: str = "plain",
    sinks: int = 0,
    recent: int = 0,
    aheads: tuple[int, ...] = (0, 100),
    dtype: torch.dtype = torch.float32,
) -> Event:
    """A random event.

    Args:
        shape: layers, batch, KV heads, head_dim.
        aheads: tokens that a row of the batch has read beyond a full cache: one of these each.
    """
    layers, batch, heads, width = shape
    rng = np.random.default_rng(seed)
    seen = budget + buffer + rng.choice(np.array(aheads, np.int64), batch)
    positions = np.empty((layers, batch, heads, budget), np.int64)
    for where in np.ndindex(layers, batch, heads):
        old = int(seen[where[1]]) - buffer
        positions[where] = (
            np.arange(budget)
            if old == budget
            else rng.choice(old, budget, False)
            if old < 10**6
            else (old - 1 - rng.permutation(3 * budget)[:budget])
        )
    ring = seen[None, :, None, None] - buffer + np.zeros((layers, 1, heads, 1), np.int64) + np.arange(buffer)
    held = np.concatenate([positions, ring], -1)
    if kind == "plain":
        log_beta = -rng.exponential(0.3, held.shape)
    elif kind == "levels":
        log_beta = -rng.integers(0, 3, held.shape) / 4
    elif kind == "special":
        log_beta = rng.choice(SPECIAL, held.shape)
    elif kind == "zeros":
        log_beta = rng.choice(SPECIAL[:2], held.shape)
    else:
        log_beta = F32(-4.0) / (seen[None, :, None, None] + 1 - held).astype(F32)
    rows = (torch.from_numpy(rng.standard_normal((*held.shape, width)).astype(F32)).to(dtype) for _ in range(2))
    tables = (*rows, torch.from_numpy(log_beta.astype(F32)), torch.from_numpy(positions))
    return Event(tables, torch.from_numpy(seen), torch.from_numpy(rng.random(batch) < 0.7), budget, sinks, recent)


def expected(case: Event) -> list[Tensor]:
    """Key, value, log_beta and positions after the event: survivors of the ring fill the holes in slot order."""
    want = [table.clone() for table in case.tables]
    key, value, log_beta, positions = want
    budget, buffer = case.budget, case.tables[2].shape[-1] - case.budget
    for layer, row, head in np.ndindex(*positions.shape[:3]):
        if not case.due[row]:
            continue
        seen = int(case.seen[row])
        held = [*positions[layer, row, head].tolist(), *range(seen - buffer, seen)]
        oracle = OracleCache(1, 1, budget, buffer, case.sinks, case.recent)
        for position, lb in zip(held, log_beta[layer, row, head].tolist(), strict=True):
            oracle.append(0, 0, position, lb)
        assert oracle.end_step(seen)
        stay = set(oracle.positions(0, 0))
        holes = [slot for slot in range(budget) if held[slot] not in stay]
        movers = [slot for slot in range(budget, budget + buffer) if held[slot] in stay]
        for hole, mover in zip(holes, movers, strict=True):
            positions[layer, row, head, hole] = held[mover]
            for table in (key, value, log_beta):
                table[layer, row, head, hole] = table[layer, row, head, mover]
    return want


@st.composite
def events(draw: st.DrawFn, most: int = 2) -> Event:
    """Small events of all kinds; ``most`` layers, rows and heads."""
    budget, buffer = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 5, 8, 13]))
    sinks = min(draw(st.sampled_from([0, 0, 1, 4])), budget)
    return event(
        (draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(1, 5))),
        budget,
        buffer,
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(KINDS)),
        sinks,
        min(draw(st.sampled_from([0, 0, 1, 3])), budget - sinks),
        draw(st.sampled_from([(0, 7), (0, 100), (2**24 - 3, 2**24 + 1), (2**31 + 11,)])),
    )
