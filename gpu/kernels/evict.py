"""The eviction event in one launch: score, select and move, one program per (layer, row of the batch, KV head)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_edge.errors import ConfigError
from trimkv_edge.policies.selection import PROTECTED

# Rows of keys and values that a program moves at a time.
_ROWS = 16
_NEVER = tl.constexpr(2**31 - 1)
_PROTECTED = tl.constexpr(PROTECTED)


@triton.jit
def _order(log_beta, position, seen, sinks, recent, valid):
    """int32 numbers in the order of the scores; of slots that are not ``valid`` above all others."""
    score = log_beta * (seen + 1 - position).to(tl.float32)
    score = tl.where((position < sinks) | (position >= seen - recent), _PROTECTED, score)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(valid, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NEVER)


@triton.jit
def _count(left, right):
    return tl.sum(left.to(tl.int32)) + tl.sum(right.to(tl.int32))


@triton.jit
def _evict(
    key,
    value,
    log_beta,
    positions,
    seen_of,
    due,
    moves,
    key_layer,
    key_row,
    key_head,
    key_slot,
    value_layer,
    value_row,
    value_head,
    value_slot,
    batch,
    heads,
    budget,
    buffer,
    sinks,
    recent,
    width,
    KEPT: tl.constexpr,
    RING: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    if tl.load(due + row) == 0:
        return
    seen = tl.load(seen_of + row)
    index = (layer * batch + row) * heads + head
    log_beta += index * (budget + buffer)
    positions += index * budget
    holes = moves + index * 2 * buffer
    movers = holes + buffer

    slot = tl.arange(0, KEPT)
    place = tl.arange(0, RING)
    in_kept, in_ring = slot < budget, place < buffer
    kept_at = tl.load(positions + slot, in_kept, 0)
    ring_at = seen - buffer + place
    kept = _order(tl.load(log_beta + slot, in_kept, 0.0), kept_at, seen, sinks, recent, in_kept)
    ring = _order(tl.load(log_beta + budget + place, in_ring, 0.0), ring_at, seen, sinks, recent, in_ring)

    # The score of the last to leave, from its highest bit down: what has fewer than B below it is not above it.
    threshold = tl.full([], 0, tl.int32)
    if _count(kept < threshold, ring < threshold) >= buffer:
        threshold = tl.full([], -(2**31), tl.int32)
    for bit in range(31):
        candidate = threshold | (1 << (30 - bit))
        if _count(kept < candidate, ring < candidate) < buffer:
            threshold = candidate
    below = _count(kept < threshold, ring < threshold)
    kept_tie, ring_tie = (kept == threshold) & in_kept, (ring == threshold) & in_ring
    # Of those at the threshold the oldest leave, up to this position.
    newest = seen
    if below + _count(kept_tie, ring_tie) > buffer:
        newest = tl.full([], 0, tl.int64)
        for bit in range(62):
            candidate = newest | (tl.full([], 1, tl.int64) << (61 - bit))
            if below + _count(kept_tie & (kept_at < candidate), ring_tie & (ring_at < candidate)) < buffer:
                newest = candidate
    leaves = (kept < threshold) | (kept_tie & (kept_at <= newest))
    stays = in_ring & (ring >= threshold) & ~(ring_tie & (ring_at <= newest))

    # Holes and movers, each in slot order, are as many: the k-th mover fills the k-th hole.
    tl.store(holes + tl.cumsum(leaves.to(tl.int32)) - 1, slot, leaves)
    tl.store(movers + tl.cumsum(stays.to(tl.int32)) - 1, place, stays)
    tl.debug_barrier()
    count = tl.sum(stays.to(tl.int32))
    column = tl.arange(0, WIDTH)
    key += layer * key_layer + row * key_row + head * key_head
    value += layer * value_layer + row * value_row + head * value_head
    for first in range(0, count, ROWS):
        rank = first + tl.arange(0, ROWS)
        moved = rank < count
        to = tl.load(holes + rank, moved, 0).to(tl.int64)
        origin = tl.load(movers + rank, moved, 0).to(tl.int64)
        tl.store(log_beta + to, tl.load(log_beta + budget + origin, moved, 0.0), moved)
        tl.store(positions + to, seen - buffer + origin, moved)
        inside = moved[:, None] & (column < width)[None, :]
        to, origin = to[:, None], (budget + origin)[:, None]
        tl.store(key + to * key_slot + column, tl.load(key + origin * key_slot + column, inside, 0.0), inside)
        tl.store(value + to * value_slot + column, tl.load(value + origin * value_slot + column, inside, 0.0), inside)


def evict(
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    positions: Tensor,
    seen: Tensor,
    due: Tensor,
    budget: int,
    sinks: int,
    recent: int,
) -> None:
    """See :func:`trimkv_edge.gpu.ops.evict`.

    Raises:
        ConfigError: ``log_beta`` or ``positions`` is not contiguous, or the last dimension of ``key`` or ``value``.
    """
    if not (log_beta.is_contiguous() and positions.is_contiguous() and key.stride(-1) == value.stride(-1) == 1):
        raise ConfigError("the eviction kernel needs contiguous log_beta and positions, and rows of keys and values")
    layers, batch, heads, slots = log_beta.shape
    buffer, width = slots - budget, key.shape[-1]
    kept = triton.next_power_of_2(budget)
    moves = torch.empty(layers, batch, heads, 2, buffer, dtype=torch.int32, device=key.device)
    _evict[heads, batch, layers](
        key,
        value,
        log_beta,
        positions,
        seen,
        due,
        moves,
        *key.stride()[:4],
        *value.stride()[:4],
        batch,
        heads,
        budget,
        buffer,
        sinks,
        recent,
        width,
        KEPT=kept,
        RING=triton.next_power_of_2(buffer),
        WIDTH=triton.next_power_of_2(width),
        ROWS=_ROWS,
        num_warps=warps_of(kept),
    )


def warps_of(kept: int) -> int:
    """Warps of a program whose head keeps ``kept`` entries, a power of two: eight entries or less of each thread, up to
    the 32 warps that a program may have."""
    return min(max(kept // 256, 4), 32)
