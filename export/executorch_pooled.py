"""The ExecuTorch target where heads share a budget: every (layer, KV head) has its own tables and its own length.

A head's tables have exactly ``cap + buffer`` slots, and attention reads its live ones only. A new token goes behind the
head's last entry, slot ``lengths[row] + fill``. What all heads need at an event lies in three tables of one row per
(layer, KV head): ``log_beta``, ``kept`` (positions of kept entries, see
:func:`~trimkv_edge.pooled_eviction.ragged_positions`) and ``lengths``. The methods:

======================== =================================================================================
``forward``              input_ids int64 [1, T], position int64 [1], fill int64 [1] -> logits, x_0, ..., x_{L-1}
``gates``                fill int64 [1] of their first token, x_0, ..., x_{L-1} -> the same; writes their log-betas
``evict``                seen int64 [1], fill int64 [1] -> new lengths int64 [layers * heads, 1]
``reset``                run once after loading, and per stream
``read_kept``            positions int64 [layers * heads, largest cap]; ``write_kept`` replaces them
``read_lengths``         int64 [layers * heads, 1]; ``write_lengths`` replaces them
``read_state``           start int64 [1] -> a block of slots of every head; ``write_state`` replaces it
======================== =================================================================================
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.executorch_cache import STATE_BLOCK
from trimkv_edge.pooled_eviction import by_rank
from trimkv_edge.row_blocks import pooled_event, put_back


class PooledExportCache(nn.Module):
    """Buffers and everything that reads or writes them except the forward pass.

    Args:
        config: cache settings with caps, constants of the graphs.
        layers, heads, head_dim: shape of the model; ``heads`` are KV heads.
    """

    log_beta: Tensor
    kept: Tensor
    lengths: Tensor

    def __init__(self, config: CacheConfig, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        assert config.caps is not None
        self.config = config
        self.layers, self.heads, self.head_dim = layers, heads, head_dim
        caps = [cap for row in config.caps for cap in row]
        self.slots = [cap + config.buffer for cap in caps]
        self.width = max(self.slots)
        self.block = min(STATE_BLOCK, self.width)
        # An entry moves from behind the kept prefix into it, so no more can than lie on the smaller side.
        self.moves = [min(cap, slots // 2) for cap, slots in zip(caps, self.slots, strict=True)]
        for row, slots in enumerate(self.slots):
            for kind in ("key", "value"):
                self.register_buffer(f"{kind}_{row // heads}_{row % heads}", self._table(slots, head_dim))
        rows = len(caps)
        self.register_buffer("log_beta", self._table(rows * self.width, 1))
        self.register_buffer("kept", torch.zeros(rows, max(caps), dtype=torch.int64))
        self.register_buffer("lengths", torch.zeros(rows, 1, dtype=torch.int64))

    @property
    def rows(self) -> int:
        """Layers x KV heads."""
        return len(self.slots)

    def key(self, row: int) -> Tensor:
        """Keys of row ``layer * heads + head``."""
        return self.get_buffer(f"key_{row // self.heads}_{row % self.heads}")

    def value(self, row: int) -> Tensor:
        """Values of a row, like :meth:`key`."""
        return self.get_buffer(f"value_{row // self.heads}_{row % self.heads}")

    def examples(self) -> dict[str, tuple[Tensor, ...]]:
        """Arguments to trace each method with, ``forward`` aside."""
        number = torch.zeros(1, dtype=torch.int64)
        block = tuple(table.clone() for table in self.read_state(number))
        return {
            "evict": (number, number.clone()),
            "reset": (),
            "read_kept": (),
            "write_kept": (self.kept.clone(),),
            "read_lengths": (),
            "write_lengths": (self.lengths.clone(),),
            "read_state": (number,),
            "write_state": (number, *block),
        }

    def evict(self, seen: Tensor, fill: Tensor) -> Tensor:
        """The eviction event; ``seen`` and ``fill`` are int64 ``[1]``. Returns the new lengths, int64 ``[rows, 1]``."""
        table = self.log_beta.view(self.rows, self.width)
        blocks = pooled_event(table, self.kept, self.lengths, seen, fill, self.layers, self.config)
        log_betas: list[Tensor] = []
        positions: list[Tensor] = []
        for block in blocks:
            # Real moves never end in a head's last slot, so a move that is only padding copies that slot onto itself.
            last = torch.tensor([self.slots[row] - 1 for row in block.rows], dtype=torch.int64).unsqueeze(1)
            most = max(self.moves[row] for row in block.rows)
            to, origin = (by_rank(marked, most, last) for marked in (block.holes, block.movers))
            for number, row in enumerate(block.rows):
                count = self.moves[row]
                self._move(row, to[number, :count], origin[number, :count])
            for moved, before in ((log_betas, block.log_beta), (positions, block.positions)):
                moved.append(before.scatter(1, to, before.gather(1, origin)))
        lengths = put_back([block.lengths for block in blocks], blocks, 1)
        self.kept.copy_(put_back(positions, blocks, self.kept.shape[1]))
        self.log_beta.copy_(put_back(log_betas, blocks, self.width).reshape(self.log_beta.shape))
        self.lengths.copy_(lengths)
        return lengths + 0

    def retain(self, fill: Tensor, log_betas: Tensor) -> None:
        """Writes log-betas of tokens, ``[1, T, rows]``, of which the first is number ``fill`` since the last event."""
        places = self.log_beta_places(self.lengths + fill + torch.arange(log_betas.shape[1], dtype=torch.int64))
        self.write_log_beta(places.reshape(-1), log_betas[0].t().reshape(-1, 1))

    def reset(self) -> Tensor:
        """Starts a new stream; returns int64 ``[1]``. Log-betas are 0 where no gate writes them."""
        self.log_beta.zero_()
        self.kept.zero_()
        self.lengths.zero_()
        return torch.zeros(1, dtype=torch.int64)

    def read_kept(self) -> Tensor:
        """Positions of kept entries, int64 ``[rows, largest cap]``; those behind a row's length mean nothing."""
        return self.kept.clone()

    def write_kept(self, kept: Tensor) -> Tensor:
        """Replaces what :meth:`read_kept` gives."""
        self.kept.copy_(kept)
        return torch.zeros(1, dtype=torch.int64)

    def read_lengths(self) -> Tensor:
        """Entries that each head kept at the last event, int64 ``[rows, 1]``."""
        return self.lengths.clone()

    def write_lengths(self, lengths: Tensor) -> Tensor:
        """Replaces what :meth:`read_lengths` gives."""
        self.lengths.copy_(lengths)
        return torch.zeros(1, dtype=torch.int64)

    def read_state(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``block`` slots from ``start`` (int64 ``[1]``): key and value ``[rows, block, head_dim]``, log_beta
        ``[rows * block, 1]``. In place of slots that a head does not have, its last one is given again."""
        places = self._block(start)
        key, value = (self._gather(map(table, range(self.rows)), places) for table in (self.key, self.value))
        return key, value, torch.index_select(self.log_beta.view(-1, 1), 0, self._block_of_all(start))

    def write_state(self, start: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        """Replaces what :meth:`read_state` gives; what was given again must be so here too."""
        places = self._block(start)
        for table, new in ((self.key, key), (self.value, value)):
            self._scatter(map(table, range(self.rows)), places, new)
        self.write_log_beta(self._block_of_all(start), log_beta)
        return start + 0

    def log_beta_places(self, slots: Tensor) -> Tensor:
        """Places in the log-beta table of slots ``[rows, n]``."""
        return slots + torch.arange(self.rows, dtype=torch.int64).unsqueeze(1) * self.width

    def _block(self, start: Tensor) -> Tensor:
        """Slots of a block, int64 ``[rows, block]``."""
        return torch.minimum(start + torch.arange(self.block, dtype=torch.int64), self._last_slots())

    def _block_of_all(self, start: Tensor) -> Tensor:
        slots = torch.clamp(start + torch.arange(self.block, dtype=torch.int64), max=self.width - 1)
        return self.log_beta_places(slots.unsqueeze(0)).reshape(-1)

    def _last_slots(self) -> Tensor:
        return torch.tensor(self.slots, dtype=torch.int64).unsqueeze(1) - 1

    @abstractmethod
    def write_log_beta(self, places: Tensor, new: Tensor) -> None:
        """Overwrites places ``[n]`` of the log-beta table with ``new [n, 1]``, in place."""

    @abstractmethod
    def _table(self, slots: int, width: int) -> Tensor:
        """A zeroed buffer."""

    @abstractmethod
    def _move(self, row: int, to: Tensor, origin: Tensor) -> None:
        """Copies the keys and values in slots ``origin`` to slots ``to``; both ``[n]``."""

    @abstractmethod
    def _gather(self, tables: Iterable[Tensor], slots: Tensor) -> Tensor:
        """Slots ``[rows, n]`` of each row's table, ``[rows, n, head_dim]``."""

    @abstractmethod
    def _scatter(self, tables: Iterable[Tensor], slots: Tensor, new: Tensor) -> None:
        """Replaces what :meth:`_gather` gives."""


class PooledLlamaCache(PooledExportCache):
    """For the ``llama::`` operators, whose tables are ``[1, slots, 1, width]``."""

    def write_log_beta(self, places: Tensor, new: Tensor) -> None:
        """See the base."""
        torch.ops.llama.update_cache_with_indices(new.view(1, -1, 1, 1), self.log_beta, 0, places.unsqueeze(0))

    def _table(self, slots: int, width: int) -> Tensor:
        return torch.zeros(1, slots, 1, width)

    def _move(self, row: int, to: Tensor, origin: Tensor) -> None:
        to = to.unsqueeze(0)
        for table in (self.key(row), self.value(row)):
            torch.ops.llama.update_cache_with_indices(torch.index_select(table, 1, origin), table, 0, to)

    def _gather(self, tables: Iterable[Tensor], slots: Tensor) -> Tensor:
        return torch.cat([torch.index_select(table, 1, slots[row]) for row, table in enumerate(tables)]).squeeze(2)

    def _scatter(self, tables: Iterable[Tensor], slots: Tensor, new: Tensor) -> None:
        blocks = new.unsqueeze(2)
        for row, table in enumerate(tables):
            mine = slice(row, row + 1)
            torch.ops.llama.update_cache_with_indices(blocks[mine], table, 0, slots[mine])


class PooledPortableCache(PooledExportCache):
    """For core ATen operators; tables are ``[slots, width]``."""

    def reset(self) -> Tensor:
        """Masked slots are multiplied by 0, so keys and values must be finite from the start."""
        for row in range(self.rows):
            for table in (self.key(row), self.value(row)):
                table.zero_()
        return super().reset()

    def write_log_beta(self, places: Tensor, new: Tensor) -> None:
        """See the base."""
        self.log_beta.index_put_((places,), new)

    def _table(self, slots: int, width: int) -> Tensor:
        return torch.zeros(slots, width)

    def _move(self, row: int, to: Tensor, origin: Tensor) -> None:
        for table in (self.key(row), self.value(row)):
            table.index_put_((to,), torch.index_select(table, 0, origin))

    def _gather(self, tables: Iterable[Tensor], slots: Tensor) -> Tensor:
        return torch.stack([torch.index_select(table, 0, slots[row]) for row, table in enumerate(tables)])

    def _scatter(self, tables: Iterable[Tensor], slots: Tensor, new: Tensor) -> None:
        for row, table in enumerate(tables):
            table.index_put_((slots[row],), new[row])
