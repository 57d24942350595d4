"""The shared-budget event of graphs: rows of like size together, so that short heads are not padded to the longest.

Selection costs time for every slot of a table, dead ones too, and one head may have ten times the cap of another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import find_policy
from trimkv_edge.policies.base import MODEL, Entries
from trimkv_edge.policies.pooling import keep_best
from trimkv_edge.pooled_eviction import contenders, holes_and_movers, ragged_positions, widened

# A block holds rows of more than half the slots of its largest; after so many halvings, all the rest.
_HALVINGS = 3


class RowBlock(NamedTuple):
    """What happens to some rows at an event.

    Attributes:
        rows: their numbers (layer * kv_heads + head), rising.
        positions: int64 ``[n, slots]`` before the event; log_beta: float32, alike.
        holes, movers: bool ``[n, slots]``, see :func:`~trimkv_edge.pooled_eviction.holes_and_movers`.
        lengths: int64 ``[n, 1]`` after the event.
    """

    rows: tuple[int, ...]
    positions: Tensor
    log_beta: Tensor
    holes: Tensor
    movers: Tensor
    lengths: Tensor


def rows_by_size(config: CacheConfig) -> list[tuple[tuple[int, ...], int]]:
    """Row numbers of each block, and its slots: those of its largest row."""
    assert config.caps is not None
    slots = [cap + config.buffer for caps in config.caps for cap in caps]
    blocks: dict[int, list[int]] = {}
    for row, size in enumerate(slots):
        halvings = max(halving for halving in range(_HALVINGS + 1) if size << halving <= max(slots))
        blocks.setdefault(halvings, []).append(row)
    return [(tuple(rows), max(slots[row] for row in rows)) for _, rows in sorted(blocks.items())]


def pooled_event(
    log_beta: Tensor, kept: Tensor, lengths: Tensor, seen: Tensor, fill: Tensor, layers: int, config: CacheConfig
) -> list[RowBlock]:
    """The event, block by block. Who survives is what :func:`~trimkv_edge.pooled_eviction.select_pooled` says.

    Args:
        log_beta: float32 ``[rows, W]``; kept: int64 ``[rows, W - B]``, positions of kept entries.
        lengths: int64 ``[rows, 1]``, entries that each row kept at the last event.
        seen, fill: int64 ``[1]``, tokens read so far, and since the last event.
        layers: of the model.
        config: with caps.
    """
    assert config.caps is not None
    heads = lengths.shape[0] // layers
    all_caps = [cap for caps in config.caps for cap in caps]
    by_model = find_policy(config.policy).scope == MODEL
    group = len(all_caps) if by_model else heads
    found, tables, parts = [], [], []
    for rows, slots in rows_by_size(config):
        held = take(lengths, rows, 1)
        positions = ragged_positions(take(kept, rows, slots - config.buffer), held, seen, fill, slots)
        entries = Entries(take(log_beta, rows, slots), positions, seen, layers, heads)
        valid = torch.arange(slots, dtype=torch.int64) < held + fill
        caps = torch.tensor([all_caps[row] for row in rows], dtype=torch.int64).unsqueeze(1)
        scores, valid = contenders(entries, valid, caps, config)
        number = torch.tensor([row % group for row in rows], dtype=torch.int64).unsqueeze(1)
        tables.append((scores, positions * group + number, valid))
        found.append((rows, entries))
        parts.append(
            [len(rows)] if by_model else [sum(row // heads == layer for row in rows) for layer in range(layers)]
        )
    keeps = _compete(tables, parts, config.budget * group)
    return [
        RowBlock(rows, entries.positions, entries.log_beta, *holes_and_movers(keep))
        for (rows, entries), keep in zip(found, keeps, strict=True)
    ]


def _compete(tables: list[tuple[Tensor, Tensor, Tensor]], parts: list[list[int]], budget: int) -> list[Tensor]:
    """The best ``budget`` of each group, which has some rows of each block; ``parts`` counts them, by block."""
    pieces = [[table.split(counts) for table in block] for block, counts in zip(tables, parts, strict=True)]
    kept: list[list[Tensor]] = [[] for _ in tables]
    for group in range(len(parts[0])):
        mine = [[table[group] for table in block] for block in pieces]
        scores, order, valid = (torch.cat([block[kind].reshape(1, -1) for block in mine], dim=1) for kind in range(3))
        keep = keep_best(scores, order, valid, budget).split([block[0].numel() for block in mine], dim=1)
        for block, piece, like in zip(kept, keep, mine, strict=True):
            block.append(piece.reshape(like[0].shape))
    return [torch.cat(block) if len(block) > 1 else block[0] for block in kept]


def take(table: Tensor, rows: tuple[int, ...], columns: int) -> Tensor:
    """Some rows of a table, and their first ``columns``."""
    part = table[:, :columns]
    if rows == tuple(range(table.shape[0])):
        return part
    return torch.index_select(part, 0, torch.tensor(rows, dtype=torch.int64))


def put_back(parts: list[Tensor], blocks: list[RowBlock], columns: int) -> Tensor:
    """Rows of all blocks in their own order, ``[rows, columns]``; what a part does not have is 0 or False."""
    wide = [widened(part[:, :columns], columns) for part in parts]
    order = [row for block in blocks for row in block.rows]
    if len(wide) == 1:
        return wide[0]
    back = torch.tensor([order.index(row) for row in range(len(order))], dtype=torch.int64)
    return torch.index_select(torch.cat(wide), 0, back)
