"""The device work of the bounded cache as custom ops of namespace ``trimkv``: one node each for compile and export.

On the CPU they are plain torch, on CUDA the Triton kernels of :mod:`trimkv_edge.gpu.kernels`, which wait for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.errors import TrimKVError
from trimkv_edge.eviction import plan_moves
from trimkv_edge.policies.selection import keep_per_head, protect
from trimkv_edge.retention import retention_score


@torch.library.custom_op("trimkv::evict", mutates_args=("key", "value", "log_beta", "positions"), device_types="cpu")
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
    """The eviction event of policy ``trimkv`` in all layers, for the rows of the batch that are due.

    The same survivors in the same slots as :meth:`trimkv_edge.cache.StaticCache.evict`.

    Args:
        key, value: ``[layers, batch, kv_heads, slots, head_dim]``, all slots live in rows that are due.
        log_beta: float32 ``[layers, batch, kv_heads, slots]``.
        positions: int64 ``[layers, batch, kv_heads, budget]``, of the kept entries; those of the ring follow
            from ``seen``.
        seen: int64 ``[batch]``, tokens read so far.
        due: bool ``[batch]``; other rows stay as they are.
        budget: entries M that stay; fewer than ``slots``.
        sinks, recent: first and newest positions that never leave.
    """
    held, read = held_positions(positions, seen, log_beta.shape[-1] - budget), seen.view(1, -1, 1, 1)
    scores = protect(retention_score(log_beta, held, read), held, read, sinks, recent)
    moves = plan_moves(keep_per_head(scores, held, budget), budget)
    move(key, value, log_beta, positions, held, due, moves)


@torch.library.custom_op("trimkv::attend", mutates_args=(), device_types="cpu")
def attend(query: Tensor, key: Tensor, value: Tensor, live: Tensor, scale: float) -> Tensor:
    """Attention of a chunk of T tokens, already written, over each row's live entries; causal in the chunk.

    Args:
        query: ``[batch, heads, T, head_dim]``.
        key, value: ``[batch, kv_heads, slots, head_dim]``, the chunk at ``live[b] .. live[b] + T - 1``.
        live: int64 ``[batch]``, live entries before the chunk; query t of row b sees the first ``live[b] + t + 1``.
            Below 0 where a chunk begins with padding: a query that sees none gets 0.
        scale: factor of the logits.

    Returns:
        ``[batch, T, heads, head_dim]``, dtype of ``query``.
    """
    return _attend_lengths(query, key, value, live.view(-1, 1) + query.shape[2], scale)


@torch.library.custom_op("trimkv::attend_pool", mutates_args=(), device_types="cpu")
def attend_pool(query: Tensor, key: Tensor, value: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of one token over a pool where each head's entries lie back to back.

    Args:
        query: ``[batch, heads, 1, head_dim]``.
        key, value: ``[entries, head_dim]``.
        start, length: int64 ``[batch, kv_heads]``: a head's first entry, and how many it has (at least 1).
        scale: factor of the logits.

    Returns:
        ``[batch, 1, heads, head_dim]``, dtype of ``query``.
    """
    places = start.unsqueeze(-1) + torch.arange(int(length.max()), device=start.device)
    places = places.clamp(max=key.shape[0] - 1)
    return _attend_lengths(query, key[places], value[places], length, scale)


def load_kernels(name: str) -> Any:
    """A module of :mod:`trimkv_edge.gpu.kernels`.

    Raises:
        TrimKVError: Triton is not installed.
    """
    try:
        return import_module(f"trimkv_edge.gpu.kernels.{name}")
    except ImportError as error:
        raise TrimKVError(f"running on CUDA needs Triton ({error}): pip install 'trimkv-edge[triton]'") from error


def held_positions(kept: Tensor, seen: Tensor, buffer: int) -> Tensor:
    """Positions of all slots where an event is due, as :func:`~trimkv_edge.eviction.event_positions` for a batch.

    Args:
        kept: int64 ``[layers, batch, kv_heads, budget]``; seen: int64 ``[batch]``.

    Returns:
        int64 ``[layers, batch, kv_heads, budget + buffer]``.
    """
    ring = seen.view(1, -1, 1, 1) - buffer + torch.arange(buffer, device=seen.device)
    return torch.cat([kept, ring.expand(*kept.shape[:-1], -1)], -1)


def move(
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    positions: Tensor,
    held: Tensor,
    due: Tensor,
    moves: tuple[Tensor, Tensor],
) -> None:
    """Moves entries in the rows of the batch that are due; arguments as for :func:`evict`.

    Args:
        held: see :func:`held_positions`.
        moves: destination and source slots, int64 ``[layers, batch, kv_heads, buffer]``.
    """
    destination, source = moves
    source = torch.where(due.view(1, -1, 1, 1), source, destination)
    log_beta.scatter_(-1, destination, log_beta.gather(-1, source))
    positions.copy_(held.scatter(-1, destination, held.gather(-1, source))[..., : positions.shape[-1]])
    for rows in (key, value):
        to, origin = (slot.unsqueeze(-1).expand(*slot.shape, rows.shape[-1]) for slot in (destination, source))
        rows.scatter_(-2, to, rows.gather(-2, origin))


def _attend_lengths(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention over the first ``length`` entries, int64 ``[batch, 1 or kv_heads]``; the last query sees them all."""
    count, grouped = query.shape[2], query.shape[1] != key.shape[1]
    most = max(int(length.max()), 1)
    slot = torch.arange(most, device=length.device)
    # What dead slots hold must not matter, and 0 * NaN is NaN.
    dead = (slot >= length.unsqueeze(-1)).unsqueeze(-1)
    keys, values = (table[:, :, :most].masked_fill(dead, 0.0) for table in (key, value))
    last = length.unsqueeze(-1) - count + torch.arange(count, device=length.device)
    visible = slot <= last.unsqueeze(-1)
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _on_cuda(module: str, name: str) -> Callable[..., Any]:
    """The kernel ``name`` of a module of :mod:`trimkv_edge.gpu.kernels`, on the device of its first argument."""

    def run(first: Tensor, *arguments: Any) -> Any:
        kernels = load_kernels(module)
        with torch.cuda.device(first.device):
            return getattr(kernels, name)(first, *arguments)

    return run


def _attended(query: Tensor, *_: Any) -> Tensor:
    batch, heads, count, width = query.shape
    return query.new_empty(batch, count, heads, width)


evict.register_fake(lambda *_: None)
evict.register_kernel("cuda", _on_cuda("evict", "evict"))
attend.register_fake(_attended)
attend.register_kernel("cuda", _on_cuda("attend", "attend"))
attend_pool.register_fake(_attended)
attend_pool.register_kernel("cuda", _on_cuda("attend", "attend_pool"))
