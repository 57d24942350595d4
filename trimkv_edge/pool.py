"""The cache of policies whose heads share a budget, in torch: exact, every head as long as it needs to be.

One pool holds N = budget x layers x KV heads kept entries and a ring of B new ones per head, and is never larger.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.eviction import check_caps, policy_of
from trimkv_edge.policies.base import Entries
from trimkv_edge.pooled_eviction import holes_and_movers, select_pooled

# An event permutes this share of a row's numbers at a time, so that it needs little memory beside the pool.
_COLUMN_BLOCKS = 8


class PooledCache:
    """Rows (layer, KV head) lie back to back in one pool: a row's kept entries, then its ring of B slots.

    Events run when the ring is full; the first comes after ``budget % buffer`` tokens (or B), so that the pool is full
    at ``budget + buffer`` tokens exactly, as if nothing had happened before: events before that drop nothing, unless a
    cap or the threshold does.

    Attributes:
        key, value: ``[batch, N + layers * kv_heads * B, head_dim]``; keys after RoPE.
        log_beta: float32 ``[batch, N + layers * kv_heads * B]``; positions: int64, alike.
        kept: int64 ``[batch, layers, kv_heads]``, entries that each head kept at the last event.
        seen: tokens read; fill: tokens of them since the last event.

    Raises:
        ConfigError: settings that the policy cannot honour, or caps of another model.
    """

    def __init__(
        self,
        config: CacheConfig,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.policy = policy_of(config)
        check_caps(config, num_layers, num_kv_heads)
        rows = num_layers * num_kv_heads
        size = rows * config.slots
        self.key, self.value = (torch.zeros(batch, size, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.log_beta = torch.zeros(batch, size, device=device)
        self.positions = torch.zeros(batch, size, dtype=torch.int64, device=device)
        self.kept = torch.zeros(batch, num_layers, num_kv_heads, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Empties the cache."""
        self.seen = self.fill = 0
        self.kept.zero_()
        self._lay_out()

    def stream(self, row: int) -> PooledCache:
        """An empty cache of one stream, in the memory of this one's stream ``row``."""
        made = copy.copy(self)
        for name in ("key", "value", "log_beta", "positions", "kept"):
            setattr(made, name, getattr(self, name)[row : row + 1])
        made.reset()
        return made

    def _lay_out(self) -> None:
        sizes = self.kept.flatten(1) + self.config.buffer
        self._offsets = (sizes.cumsum(1) - sizes).view_as(self.kept)

    @property
    def room(self) -> int:
        """Tokens that fit before the next event."""
        return self.config.segment(self.seen == self.fill) - self.fill

    def place(self, kept: Tensor, seen: int, fill: int) -> None:
        """Lays the rows out for ``kept`` entries of each head and ``fill`` new ones; their contents come next."""
        self.kept, self.seen, self.fill = kept.clone(), seen, fill
        self._lay_out()

    def places(self, width: int) -> Tensor:
        """Places in the pool of each head's first ``width`` slots, ``[batch, layers, kv_heads, width]``."""
        return self._slots_of(self._offsets, width)

    def _slots_of(self, rows: Tensor, width: int) -> Tensor:
        """Places in the pool of the first ``width`` slots of rows that begin at ``rows``: ``[..., width]``."""
        places = rows.unsqueeze(-1) + torch.arange(width, device=rows.device)
        return places.clamp(max=self.positions.shape[1] - 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Writes a chunk and attends over each head's live entries, causal in the chunk.

        Args:
            query: ``[batch, heads, T, head_dim]``; key, value: ``[batch, kv_heads, T, head_dim]``.

        Returns:
            ``[batch, T, heads, head_dim]``.
        """
        batch, heads, count, width = key.shape
        if count > self.room:
            raise StateError(f"a chunk of {count} tokens does not fit {self.room} free slots of the ring")
        start, held = self._offsets[:, layer], self.kept[:, layer] + self.fill
        new = self._slots_of(start + held, count).flatten(1)
        for table, rows in ((self.key, key), (self.value, value)):
            table.scatter_(1, new.unsqueeze(-1).expand(-1, -1, width), rows.flatten(1, 2).to(table.dtype))
        most = int(held.max()) + count
        places = self._slots_of(start, most).flatten(1).unsqueeze(-1).expand(-1, -1, width)
        keys, values = (table.gather(1, places).view(batch, heads, most, width) for table in (self.key, self.value))
        last = held[..., None] + torch.arange(count, device=held.device)
        visible = torch.arange(most, device=held.device) <= last.unsqueeze(-1)
        group = query.shape[1] // heads
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible.repeat_interleave(group, 1), scale=scale, enable_gqa=group > 1
        )
        return out.transpose(1, 2)

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Stores a chunk's log-betas, ``[batch, T, kv_heads]``."""
        new = self._slots_of(self._offsets[:, layer] + self.kept[:, layer] + self.fill, log_beta.shape[1])
        self.log_beta.scatter_(1, new.flatten(1), log_beta.transpose(1, 2).flatten(1))

    def advance(self, count: int) -> None:
        """Counts a chunk that every layer has written."""
        new = self._slots_of(self._offsets + self.kept + self.fill, count)
        fresh = torch.arange(self.seen, self.seen + count, device=new.device).expand_as(new)
        self.positions.scatter_(1, new.flatten(1), fresh.flatten(1))
        self.seen += count
        self.fill += count

    def evict(self) -> None:
        """The eviction event: survivors move to the front of their rows, and the rows move together.

        Raises:
            StateError: the ring is not full.
        """
        if self.room:
            raise StateError(f"eviction runs when the ring is full, now {self.room} slots are free")
        batch, layers, heads = self.kept.shape
        live = (self.kept + self.fill).view(-1, 1)
        width = int(live.max())
        places = self._slots_of(self._offsets, width).flatten(1)
        slot = torch.arange(width, device=live.device)
        valid = slot < live
        entries = Entries(
            self.log_beta.gather(1, places).view(-1, width),
            self.positions.gather(1, places).view(-1, width),
            self.seen,
            layers,
            heads,
        )
        keep = select_pooled(entries, valid, self.config)
        holes, movers, lengths = holes_and_movers(keep)
        slot = slot.expand_as(keep).clone()
        slot[movers] = slot[holes]
        self.kept = lengths.view_as(self.kept)
        self._lay_out()
        to = self._offsets.view(-1, 1) + slot
        self._permute(keep.view(batch, -1), places, to.view(batch, -1))
        self.fill = 0

    def _permute(self, keep: Tensor, places: Tensor, to: Tensor) -> None:
        """Moves the kept entries from ``places`` to ``to``; all ``[batch, n]``."""
        origin = torch.arange(self.positions.shape[1], device=to.device).repeat(len(to), 1)
        sequence = torch.arange(len(to), device=to.device).unsqueeze(1).expand_as(to)
        origin[sequence[keep], to[keep]] = places[keep]
        for table in (self.log_beta, self.positions):
            table.copy_(table.gather(1, origin))
        for table in (self.key, self.value):
            for columns in table.split(max(1, table.shape[-1] // _COLUMN_BLOCKS), -1):
                columns.copy_(columns.gather(1, origin.unsqueeze(-1).expand_as(columns)))
