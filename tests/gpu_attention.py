"""Attention over live entries in float64, entry by entry of NumPy, and the cases that it is compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

# Absolute: values are standard normal, so outputs are below 5.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def brute_force(query: Tensor, key: Tensor, value: Tensor, scale: float) -> np.ndarray:
    """One query ``[head_dim]`` over entries ``[n, head_dim]``."""
    q, k, v = (part.double().numpy() for part in (query, key, value))
    if not len(k):
        return np.zeros_like(q)
    logits = scale * k @ q
    weights = np.exp(logits - logits.max())
    return weights @ v / weights.sum()


def _moved(arguments: tuple[Tensor | float, ...], device: str) -> list[Tensor | float]:
    """To the device with their strides."""
    return [part.to(device) if isinstance(part, Tensor) else part for part in arguments]


def compare(got: Tensor, want: np.ndarray, query: Tensor) -> None:
    assert got.dtype == query.dtype
    assert got.is_contiguous()
    assert np.abs(got.double().cpu().numpy() - want).max() <= TOLERANCE[query.dtype]


@dataclass
class Chunk:
    """Arguments of ``trimkv::attend``; dead slots hold NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    live: Tensor
    scale: float

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        return self.query, self.key, self.value, self.live, self.scale

    def to(self, dtype: torch.dtype) -> Chunk:
        return Chunk(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), self.live, self.scale)

    def check(self, attend: Callable[..., Tensor], device: str = "cpu") -> None:
        batch, heads, count, width = self.query.shape
        group = heads // self.key.shape[1]
        want = np.empty((batch, count, heads, width))
        for row, step, head in np.ndindex(batch, count, heads):
            seen = max(int(self.live[row]) + step + 1, 0)
            tables = (table[row, head // group, :seen] for table in (self.key, self.value))
            want[row, step, head] = brute_force(self.query[row, head, step], *tables, self.scale)
        compare(attend(*_moved(self.arguments, device)), want, self.query)


@dataclass
class Pool:
    """Arguments of ``trimkv::attend_pool``; entries that no head owns hold NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor
    length: Tensor
    scale: float

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        return self.query, self.key, self.value, self.start, self.length, self.scale

    def to(self, dtype: torch.dtype) -> Pool:
        return Pool(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), self.start, self.length, self.scale)

    def check(self, attend: Callable[..., Tensor], device: str = "cpu") -> None:
        batch, heads, _, width = self.query.shape
        group = heads // self.start.shape[1]
        want = np.empty((batch, 1, heads, width))
        for row, head in np.ndindex(batch, heads):
            first, length = (int(table[row, head // group]) for table in (self.start, self.length))
            tables = (table[first : first + length] for table in (self.key, self.value))
            want[row, 0, head] = brute_force(self.query[row, head, 0], *tables, self.scale)
        compare(attend(*_moved(self.arguments, device)), want, self.query)


def chunk(
    live: list[int],
    slots: int,
    count: int = 1,
    kv_heads: int = 2,
    group: int = 1,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Chunk:
    """A random chunk of ``count`` tokens behind ``live`` entries in each row; of negative ones, as if that many are
    padding."""
    torch.manual_seed(seed)
    query = torch.randn(len(live), count, kv_heads * group, width).transpose(1, 2)
    # Of a cache of two layers the second: strides are not those of a tensor of its own.
    key, value = (torch.randn(2, len(live), kv_heads, slots, width)[1] for _ in range(2))
    for row, held in enumerate(live):
        for table in (key, value):
            table[row, :, max(held + count, 0) :] = torch.nan
    return Chunk(query, key, value, torch.tensor(live), width**-0.5).to(dtype)


def pool(
    lengths: list[list[int]],
    gap: int = 3,
    group: int = 1,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pool:
    """A pool of heads with ``lengths [batch][kv_heads]`` entries, ``gap`` unowned ones behind each."""
    torch.manual_seed(seed)
    length = torch.tensor(lengths)
    sizes = length.flatten() + gap
    start = (sizes.cumsum(0) - sizes).view_as(length)
    key, value = (torch.full((int(sizes.sum()), width), torch.nan) for _ in range(2))
    for first, count in zip(start.flatten().tolist(), length.flatten().tolist(), strict=True):
        for table in (key, value):
            table[first : first + count] = torch.randn(count, width)
    query = torch.randn(length.shape[0], length.shape[1] * group, 1, width)
    return Pool(query, key, value, start, length, width**-0.5).to(dtype)


CASES = {
    "token": chunk([5, 11, 0], 12, group=2, width=8),
    "chunk": chunk([5, 8], 12, 4, group=2, width=8),
    "pool": pool([[3, 9], [1, 4]], group=2, width=8),
}
_shapes = dict(
    group=st.sampled_from([1, 2, 3, 8]),
    width=st.sampled_from([64, 96, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    """Up to 150 slots; rows with none before the chunk, some, all slots full, and chunks that begin with padding."""
    count = draw(st.sampled_from([1, 1, 1, 2, 5, 17]))
    slots = draw(st.integers(count, 150))
    live = st.one_of(st.just(0), st.just(slots - count), st.integers(-count, slots - count))
    settings = draw(st.fixed_dictionaries(_shapes))
    return chunk(draw(st.lists(live, min_size=1, max_size=3)), slots, count, draw(st.integers(1, 2)), **settings)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Heads of 1 to 150 entries."""
    heads = draw(st.integers(1, 3))
    row = st.lists(st.one_of(st.just(1), st.integers(1, 150)), min_size=heads, max_size=heads)
    settings = draw(st.fixed_dictionaries(_shapes))
    return pool(draw(st.lists(row, min_size=1, max_size=2)), draw(st.sampled_from([0, 7])), **settings)
