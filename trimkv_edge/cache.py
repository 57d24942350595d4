"""The static cache of DESIGN section 3 in torch: the reference that exported graphs are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.eviction import plan_moves, select_survivors


class StaticCache:
    """Live entries of every head in a prefix of its slots: ``[0, M)`` kept, ``[M, M + B)`` the ring of new tokens.

    Attributes:
        key, value: per layer, ``[batch, kv_heads, slots, head_dim]``; keys after RoPE.
        log_beta: float32 ``[batch, layers, kv_heads, slots]``.
        positions: int64 ``[batch, layers, kv_heads, slots]``.
        seen: tokens read; live: filled slots, alike in every head.
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
        rows = (batch, num_layers, num_kv_heads, config.slots)
        shape = (batch, num_kv_heads, config.slots, head_dim)
        self.key = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.value = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.log_beta = torch.zeros(rows, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = 0
        self.live = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Writes a chunk's keys and values at the live length and attends over the live prefix, causal in the chunk.

        Args:
            query: ``[batch, heads, T, head_dim]``; key, value: ``[batch, kv_heads, T, head_dim]``.

        Returns:
            ``[batch, T, heads, head_dim]``.
        """
        start, end = self.live, self.live + query.shape[2]
        if end > self.config.slots:
            raise StateError(f"a chunk of {query.shape[2]} tokens does not fit {self.config.slots - start} free slots")
        self.key[layer][:, :, start:end] = key
        self.value[layer][:, :, start:end] = value
        visible = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        out = F.scaled_dot_product_attention(
            query,
            self.key[layer][:, :, :end],
            self.value[layer][:, :, :end],
            attn_mask=visible,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Stores a chunk's log-betas, ``[batch, T, kv_heads]``, at the live length."""
        self.log_beta[:, layer, :, self.live : self.live + log_beta.shape[1]] = log_beta.transpose(1, 2)

    def advance(self, count: int) -> None:
        """Counts a chunk that every layer has written."""
        fresh = torch.arange(self.seen, self.seen + count, device=self.positions.device)
        self.positions[..., self.live : self.live + count] = fresh
        self.seen += count
        self.live += count

    def evict(self) -> None:
        """The eviction event: moves the ring's survivors into the holes of the kept prefix; at most B rows per head.

        Raises:
            StateError: the ring is not full.
        """
        if self.live != self.config.slots:
            raise StateError(f"eviction runs when {self.config.slots} entries are live, now {self.live} are")
        budget, slots = self.config.budget, self.config.slots
        rows = self.log_beta.shape[:-1]
        keep = select_survivors(
            self.log_beta.reshape(-1, slots), self.positions.reshape(-1, slots), self.seen, self.config
        )
        destination, source = (index.view(*rows, -1) for index in plan_moves(keep, budget))
        for table in (self.log_beta, self.positions):
            table.scatter_(-1, destination, table.gather(-1, source))
        for layer, pair in enumerate(zip(self.key, self.value, strict=True)):
            for rows_of in pair:
                to, origin = (
                    slot[:, layer, :, :, None].expand(-1, -1, -1, rows_of.shape[-1]) for slot in (destination, source)
                )
                rows_of.scatter_(2, to, rows_of.gather(2, origin))
        self.live = budget

    def reset(self) -> None:
        """Empties the cache."""
        self.seen = 0
        self.live = 0
