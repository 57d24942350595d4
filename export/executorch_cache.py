"""The bounded cache as an exportable module: buffers shared by all methods of an ExecuTorch program.

One buffer per layer and kind holds a row of ``head_dim`` numbers per (slot, head); one more holds the log-betas of all
layers, so that they are written at once. Graphs keep positions of the kept prefix only, see
:func:`trimkv_edge.eviction.event_positions`. The two operator sets differ in the order of the rows and in how a row is
written:

``xnnpack``   row = slot * heads + head, ``llama::update_cache`` and ``llama::custom_sdpa`` over the live prefix
``portable``  row = head * slots + slot, plain ATen ``index_put`` and attention over every slot under a mask
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import event_positions, find_policy, plan_moves, select_survivors
from trimkv_edge.policies.base import Entries

# Not -inf or finfo.min: those give NaN in fused kernels.
MASKED = -1.0e30
# Slots that one read_state or write_state call moves; bounds the memory of a saved state.
STATE_BLOCK = 16


class ExportCache(nn.Module):
    """Buffers and everything that reads or writes them except the forward pass.

    Args:
        config: cache settings, constants of the graphs.
        layers, heads, head_dim: shape of the model; ``heads`` are KV heads.
    """

    kept: Tensor
    log_beta: Tensor

    def __init__(self, config: CacheConfig, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.layers, self.heads, self.head_dim = layers, heads, head_dim
        self.block = min(STATE_BLOCK, config.slots)
        for layer in range(layers):
            for kind in ("key", "value"):
                self.register_buffer(f"{kind}_{layer}", self._table(heads, head_dim))
        self.register_buffer("log_beta", self._table(layers * heads, 1))
        self.register_buffer("kept", self._first_positions())

    def key(self, layer: int) -> Tensor:
        """Keys of a layer, in the variant's row order."""
        return self.get_buffer(f"key_{layer}")

    def value(self, layer: int) -> Tensor:
        """Values of a layer, like :meth:`key`."""
        return self.get_buffer(f"value_{layer}")

    def examples(self) -> dict[str, tuple[Tensor, ...]]:
        """Arguments to trace each method with, ``forward`` aside."""
        number = torch.zeros(1, dtype=torch.int64)
        block = tuple(table.clone() for table in self.read_state(number))
        return {
            "evict": (number,),
            "reset": (),
            "read_kept": (),
            "write_kept": (self.kept.clone(),),
            "read_state": (number,),
            "write_state": (number, *block),
        }

    def evict(self, seen: Tensor) -> Tensor:
        """The eviction event; ``seen`` int64 ``[1]``. Returns it, since a method must return something."""
        budget = self.config.budget
        positions = event_positions(self.kept, seen, self.config.buffer)
        keep = select_survivors(self._entries(positions, seen), self.config)
        destination, source = plan_moves(keep, budget)
        moved = positions.scatter(1, destination, positions.gather(1, source))
        self._move(self.log_beta, destination, source)
        to, origin = (index.view(self.layers, self.heads, -1) for index in (destination, source))
        for layer in range(self.layers):
            self._move(self.key(layer), to[layer], origin[layer])
            self._move(self.value(layer), to[layer], origin[layer])
        self.kept.copy_(moved[:, :budget])
        return seen + 0

    def _entries(self, positions: Tensor, seen: Tensor) -> Entries:
        score = find_policy(self.config.policy).key_score
        scores = torch.cat([score(self._key_by_head(layer)) for layer in range(self.layers)]) if score else None
        return Entries(self._log_beta_by_row(), positions, seen, self.layers, self.heads, key_score=scores)

    def retain(self, slot: Tensor, log_betas: Tensor) -> None:
        """Writes log-betas ``[1, T, layers * heads]`` of the tokens from ``slot`` (int64 ``[1]``) on."""
        rows = self._rows_from(slot, log_betas.shape[1], self.layers * self.heads)
        self._write(self.log_beta, rows, log_betas.reshape(-1, 1))

    def reset(self) -> Tensor:
        """Starts a new stream; returns int64 ``[1]``. Log-betas are 0 where no gate writes them."""
        self.log_beta.zero_()
        self.kept.copy_(self._first_positions())
        return torch.zeros(1, dtype=torch.int64)

    def read_kept(self) -> Tensor:
        """Positions in slots ``[0, budget)``, int64 ``[layers * heads, budget]``."""
        return self.kept.clone()

    def write_kept(self, kept: Tensor) -> Tensor:
        """Replaces what :meth:`read_kept` gives."""
        self.kept.copy_(kept)
        return torch.zeros(1, dtype=torch.int64)

    def read_state(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``block`` slots from ``start`` (int64 ``[1]``): key and value ``[layers, block * heads, head_dim]`` and
        log_beta ``[block * layers * heads, 1]``; rows are slot-major in both variants."""
        rows, all_rows = self._block_rows(start, self.heads), self._block_rows(start, self.layers * self.heads)
        key, value = (
            torch.stack([self._read(table(layer), rows) for layer in range(self.layers)])
            for table in (self.key, self.value)
        )
        return key, value, self._read(self.log_beta, all_rows)

    def write_state(self, start: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        """Replaces what :meth:`read_state` gives."""
        rows, all_rows = self._block_rows(start, self.heads), self._block_rows(start, self.layers * self.heads)
        for layer in range(self.layers):
            self._write(self.key(layer), rows, key[layer])
            self._write(self.value(layer), rows, value[layer])
        self._write(self.log_beta, all_rows, log_beta)
        return start + 0

    @abstractmethod
    def _table(self, heads: int, width: int) -> Tensor:
        """A zeroed buffer of ``slots * heads`` rows."""

    @abstractmethod
    def _row(self, slot: Tensor, head: Tensor, heads: int) -> Tensor:
        """Row of a (slot, head) in a table of ``heads`` heads."""

    @abstractmethod
    def _read(self, table: Tensor, rows: Tensor) -> Tensor:
        """``[n]`` row numbers -> ``[n, width]``."""

    @abstractmethod
    def _write(self, table: Tensor, rows: Tensor, new: Tensor) -> None:
        """Overwrites rows ``[n]`` with ``new [n, width]``, in place."""

    @abstractmethod
    def _key_by_head(self, layer: int) -> Tensor:
        """``[heads, slots, head_dim]``."""

    @abstractmethod
    def _log_beta_by_row(self) -> Tensor:
        """``[layers * heads, slots]``."""

    def _move(self, table: Tensor, destination: Tensor, source: Tensor) -> None:
        heads = destination.shape[0]
        head = torch.arange(heads, dtype=torch.int64).unsqueeze(1)
        to, origin = (self._row(slot, head, heads).reshape(-1) for slot in (destination, source))
        self._write(table, to, self._read(table, origin))

    def _block_rows(self, start: Tensor, heads: int) -> Tensor:
        return self._rows_from(start, self.block, heads)

    def _rows_from(self, start: Tensor, count: int, heads: int) -> Tensor:
        slot = (start + torch.arange(count, dtype=torch.int64)).unsqueeze(1)
        return self._row(slot, torch.arange(heads, dtype=torch.int64), heads).reshape(-1)

    def _first_positions(self) -> Tensor:
        return torch.arange(self.config.budget, dtype=torch.int64).repeat(self.layers * self.heads, 1)


class LlamaCache(ExportCache):
    """For the ``llama::`` operators, whose tables are ``[1, rows, 1, width]``."""

    def _table(self, heads: int, width: int) -> Tensor:
        return torch.zeros(1, self.config.slots * heads, 1, width)

    def _row(self, slot: Tensor, head: Tensor, heads: int) -> Tensor:
        return slot * heads + head

    def _read(self, table: Tensor, rows: Tensor) -> Tensor:
        return torch.index_select(table.view(-1, table.shape[-1]), 0, rows)

    def _write(self, table: Tensor, rows: Tensor, new: Tensor) -> None:
        width = table.shape[-1]
        torch.ops.llama.update_cache_with_indices(new.reshape(1, -1, 1, width), table, 0, rows.unsqueeze(0))

    def _log_beta_by_row(self) -> Tensor:
        return self.log_beta.view(self.config.slots, -1).t()

    def _key_by_head(self, layer: int) -> Tensor:
        return self.key(layer).view(self.config.slots, self.heads, self.head_dim).transpose(0, 1)


class PortableCache(ExportCache):
    """For core ATen operators; tables are ``[rows, width]``: in-place ``index_put`` takes one index only."""

    def _table(self, heads: int, width: int) -> Tensor:
        return torch.zeros(heads * self.config.slots, width)

    def _row(self, slot: Tensor, head: Tensor, heads: int) -> Tensor:
        return head * self.config.slots + slot

    def _read(self, table: Tensor, rows: Tensor) -> Tensor:
        return torch.index_select(table, 0, rows)

    def _write(self, table: Tensor, rows: Tensor, new: Tensor) -> None:
        table.index_put_((rows,), new)

    def _log_beta_by_row(self) -> Tensor:
        return self.log_beta.view(-1, self.config.slots)

    def _key_by_head(self, layer: int) -> Tensor:
        return self.key(layer).view(self.heads, self.config.slots, self.head_dim)

    def reset(self) -> Tensor:
        """Masked slots are multiplied by 0, so keys and values must be finite from the start."""
        for layer in range(self.layers):
            for table in (self.key(layer), self.value(layer)):
                table.zero_()
        return super().reset()
