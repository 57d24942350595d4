"""Attention that reads live entries and no others: each program takes one share of a head's entries (split-KV), and a
second launch combines the shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_edge.errors import ConfigError

_LOG2_E = 1.4426950408889634
# Queries of a program: no fewer than a tensor core multiplies at once.
_FEWEST = 16


@dataclass(frozen=True)
class Shares:
    """How the work is cut up. Results differ in the last bits only.

    Attributes:
        block: entries that a program reads at a time; queries: most queries of a program; powers of two from 16.
        programs: of a launch; as many shares of each head are made as lead to this number.
        warps, stages: of a program, see :class:`triton.Config`.
    """

    block: int = 64
    queries: int = 64
    programs: int = 1024
    warps: int = 4
    stages: int = 2


def shares_of(dtype: str) -> Shares:
    """What queries of that dtype take by default."""
    # float32 stays off the tensor cores, which round to TF32: larger tiles do not fit the registers.
    return Shares(block=32, queries=16, warps=8) if dtype == "float32" else Shares()


@triton.jit
def _attend_split(
    query,
    key,
    value,
    start,
    length,
    partial,
    weight,
    scale,
    query_row,
    query_head,
    query_step,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    kv_heads,
    count,
    width,
    splits,
    POOL: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WORK: tl.constexpr,
):
    """Queries of a KV head are numbered ``step * GROUP + head in the group``; ``scale`` is that of base 2."""
    split = tl.program_id(0)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    row = (tl.program_id(1) // kv_heads).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    number = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    asked = number < count * GROUP
    step = number // GROUP
    place = row * query_row + (head * GROUP + number % GROUP) * query_head + step * query_step
    q = tl.load(query + place[:, None] + column[None, :], asked[:, None] & inside[None, :], 0.0).to(WORK)
    if POOL:
        owner = row * kv_heads + head
        first = tl.load(start + owner)
        key += first * key_slot
        value += first * value_slot
        before = tl.load(length + owner).to(tl.int32) - count
    else:
        key += row * key_row + head * key_head
        value += row * value_row + head * value_head
        before = tl.load(length + row).to(tl.int32)
    # The last query of this program sees the most.
    live = tl.maximum(before + tl.minimum(count, (tl.program_id(2) * QUERIES + QUERIES - 1) // GROUP + 1), 0)
    share = tl.cdiv(tl.cdiv(live, BLOCK), splits) * BLOCK
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for at in range(split * share, tl.minimum((split + 1) * share, live), BLOCK):
        slot = at + tl.arange(0, BLOCK)
        held = slot < live
        reach = held[:, None] & inside[None, :]
        offset = slot.to(tl.int64)[:, None]
        k = tl.load(key + offset * key_slot + column[None, :], reach, 0.0).to(WORK)
        v = tl.load(value + offset * value_slot + column[None, :], reach, 0.0).to(WORK)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(slot[None, :] <= before + step[:, None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A query that sees nothing yet has only -inf, and -inf - -inf is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(WORK), v, input_precision="ieee")
        top = higher
    rows = (tl.program_id(1).to(tl.int64) * count * GROUP + number) * splits + split
    tl.store(weight + rows * 2, top, asked)
    tl.store(weight + rows * 2 + 1, total, asked)
    tl.store(partial + rows[:, None] * width + column[None, :], mixed, asked[:, None] & inside[None, :])


@triton.jit
def _combine(
    partial,
    weight,
    out,
    kv_heads,
    count,
    width,
    splits,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    number = tl.program_id(0)
    owner = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    rows = (owner * count * GROUP + number) * splits + split
    there = split < splits
    top = tl.load(weight + rows * 2, there, float("-inf"))
    total = tl.load(weight + rows * 2 + 1, there, 0.0)
    mixed = tl.load(partial + rows[:, None] * width + column[None, :], there[:, None] & (column < width)[None, :], 0.0)
    # A share without entries weighs nothing; a query that sees none at all gets 0.
    fade = tl.where(total > 0.0, tl.exp2(top - tl.max(top, 0)), 0.0)
    result = tl.sum(mixed * fade[:, None], 0) / tl.maximum(tl.sum(total * fade, 0), 1e-38)
    step, head = number // GROUP, (owner % kv_heads) * GROUP + number % GROUP
    place = (owner // kv_heads * count + step) * kv_heads * GROUP + head
    tl.store(out + place * width + column, result.to(out.dtype.element_ty), column < width)


def attend(
    query: Tensor, key: Tensor, value: Tensor, live: Tensor, scale: float, shares: Shares | None = None
) -> Tensor:
    """See :func:`trimkv_edge.gpu.ops.attend`.

    Raises:
        ConfigError: the last dimension of query, key or value is not contiguous.
    """
    return _launch(query, key, value, None, live, scale, key.shape[1], key.shape[2], shares)


def attend_pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    shares: Shares | None = None,
) -> Tensor:
    """See :func:`trimkv_edge.gpu.ops.attend_pool`, and :func:`attend` for errors."""
    key, value = key[None, None], value[None, None]
    start, length = start.contiguous(), length.contiguous()
    return _launch(query, key, value, start, length, scale, start.shape[1], key.shape[2], shares)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    length: Tensor,
    scale: float,
    kv_heads: int,
    most: int,
    shares: Shares | None,
) -> Tensor:
    """Grids depend on shapes only, so that a CUDA graph holds them: ``most`` entries of a head bound the splits."""
    if any(table.stride(-1) != 1 for table in (query, key, value)):
        raise ConfigError("attention kernels read rows: the last dimension of query, key and value must be contiguous")
    batch, heads, count, width = query.shape
    group = heads // kv_heads
    # The interpreter multiplies bfloat16 as integers and loses the carry when it rounds to it.
    dtype = query.dtype if query.is_cuda else torch.float32
    work = str(dtype).removeprefix("torch.")
    shares = shares or shares_of(work)
    queries = min(max(triton.next_power_of_2(count * group), _FEWEST), shares.queries)
    blocks = triton.cdiv(count * group, queries)
    # A program of more queries has more to do, and its results are larger.
    wanted = shares.programs // (batch * kv_heads * blocks * (queries // _FEWEST))
    splits = max(1, min(triton.cdiv(most, shares.block), wanted))
    padded = max(triton.next_power_of_2(width), 16)
    partial = torch.empty(batch, heads * count, splits, width, dtype=torch.float32, device=query.device)
    weight = torch.empty(batch, heads * count, splits, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, count, heads, width, dtype=dtype, device=query.device)
    _attend_split[splits, batch * kv_heads, blocks](
        query,
        key,
        value,
        length if start is None else start,
        length,
        partial,
        weight,
        scale * _LOG2_E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        kv_heads,
        count,
        width,
        splits,
        POOL=start is not None,
        GROUP=group,
        QUERIES=queries,
        BLOCK=shares.block,
        WIDTH=padded,
        WORK=getattr(tl, work),
        num_warps=shares.warps,
        num_stages=shares.stages,
    )
    _combine[count * group, batch * kv_heads](
        partial,
        weight,
        out,
        kv_heads,
        count,
        width,
        splits,
        GROUP=group,
        SPLITS=triton.next_power_of_2(splits),
        WIDTH=padded,
        num_warps=4,
    )
    return out.to(query.dtype)
