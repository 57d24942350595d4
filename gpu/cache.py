"""The static cache of a batch of streams on a device: one allocation for all layers, a length for each stream.

Nothing here waits for the device: which streams are due for an event is known to whoever counts their tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import plan_moves, policy_of, select_survivors
from trimkv_edge.gpu.ops import held_positions, move
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import Entries

_FUSED = "trimkv"  # the policy of the fused eviction op


class BatchedCache:
    """Live entries of every head in a prefix of its slots, as in :class:`~trimkv_edge.cache.StaticCache`.

    Attributes:
        key, value: ``[layers, batch, kv_heads, slots, head_dim]``; keys after RoPE.
        log_beta: float32 ``[layers, batch, kv_heads, slots]``.
        keys, values, log_betas: the same memory, layer by layer.
        positions: int64 ``[layers, batch, kv_heads, budget]``, of kept entries; the ring's follow from ``seen``.
        live, seen: int64 ``[batch]``, filled slots and tokens read of each stream.

    Raises:
        ConfigError: a policy that shares a budget, looks at attention or never evicts, or keys and values in another
            storage than the model's own numbers.
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
        check_config(config)
        if batch < 1:
            raise ConfigError(f"batch is {batch}, but must be at least 1")
        self.config, self.policy = config, policy_of(config)
        rows = (num_layers, batch, num_kv_heads)
        shape = (*rows, config.slots, head_dim)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.log_beta = torch.zeros(*rows, config.slots, device=device)
        self.positions = torch.zeros(*rows, config.budget, dtype=torch.int64, device=device)
        self.live, self.seen = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        # One tensor for each layer: a write into a part of a graph's input would be compiled to a copy of the whole.
        self.keys, self.values, self.log_betas = (table.unbind(0) for table in (self.key, self.value, self.log_beta))
        whole = (self.key, self.value, self.log_beta, self.positions, self.live, self.seen)
        # CUDA graphs write these where they lie; without the mark torch.compile makes none of a graph that writes them.
        for tensor in (*whole, *self.keys, *self.values, *self.log_betas):
            torch._dynamo.mark_static_address(tensor)
        self.reset()

    @property
    def batch(self) -> int:
        """Streams."""
        return int(self.live.shape[0])

    def reset(self, row: int | None = None) -> None:
        """Empties one stream, or all."""
        rows = slice(None) if row is None else slice(row, row + 1)
        self.positions[:, rows] = torch.arange(self.config.budget, device=self.positions.device)
        self.place(0, 0, row)

    def place(self, seen: int, live: int, row: int | None = None) -> None:
        """Sets the lengths of one stream, or of all; what lies behind ``live`` counts for nothing."""
        rows = slice(None) if row is None else slice(row, row + 1)
        self.seen[rows] = seen
        self.live[rows] = live

    def advance(self, count: Tensor) -> None:
        """Counts a chunk that every layer has written, int64 ``[batch]`` tokens."""
        self.seen += count
        self.live += count

    def evict(self, due: Tensor) -> None:
        """The eviction event of the streams in ``due``, bool ``[batch]``, whose slots are all live."""
        config = self.config
        if config.policy == _FUSED and config.lookahead == 1:
            torch.ops.trimkv.evict(
                self.key,
                self.value,
                self.log_beta,
                self.positions,
                self.seen,
                due,
                config.budget,
                config.sinks,
                config.recent,
            )
        else:
            self._evict_by_policy(due)
        self.live.copy_(torch.where(due, config.budget, self.live))

    def _evict_by_policy(self, due: Tensor) -> None:
        """The core's own event, written into the rows that are due."""
        layers, batch, heads, _ = self.log_beta.shape
        buffer = self.config.buffer
        held = held_positions(self.positions, self.seen, buffer)
        score = self.policy.key_score
        entries = Entries(
            # The core's rows go by stream, then layer.
            self.log_beta.transpose(0, 1).flatten(0, 2),
            held.transpose(0, 1).flatten(0, 2),
            self.seen.repeat_interleave(layers * heads).unsqueeze(1),
            layers,
            heads,
            key_score=score(self.key).transpose(0, 1).flatten(0, 2) if score else None,
        )
        moves = plan_moves(select_survivors(entries, self.config), self.config.budget)
        destination, source = (slot.view(batch, layers, heads, buffer).transpose(0, 1) for slot in moves)
        move(self.key, self.value, self.log_beta, self.positions, held, due, (destination, source))

    def read(self, row: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Key, value ``[layers, kv_heads, slots, head_dim]`` and log_beta ``[layers, kv_heads, slots]`` of a stream."""
        key, value, log_beta = (table[:, row].float().cpu().numpy() for table in (self.key, self.value, self.log_beta))
        return key, value, log_beta

    def kept(self, row: int) -> IntArray:
        """Positions of a stream's slots ``[0, budget)``, ``[layers, kv_heads, budget]``."""
        return np.asarray(self.positions[:, row].cpu().numpy()).copy()

    def write(
        self, row: int, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        """Replaces a stream; arrays as :meth:`read` and :meth:`kept` give them, but only ``live`` slots of them."""
        for table, rows in ((self.key, key), (self.value, value), (self.log_beta, log_beta)):
            table[:, row, :, :live] = torch.from_numpy(np.ascontiguousarray(rows)).to(table)
        self.positions[:, row] = torch.from_numpy(np.ascontiguousarray(kept)).to(self.positions)
        self.place(seen, live, row)


def check_config(config: CacheConfig) -> None:
    """Raises :class:`ConfigError` for settings that this cache cannot honour."""
    policy = policy_of(config)
    if policy.pooled or not policy.exports:
        able = ", ".join(name for name, other in POLICIES.items() if other.exports and not other.pooled)
        lacks = (
            "has heads of different lengths, and this cache has none"
            if policy.pooled
            else "never evicts or looks at attention, and the torch engine does neither"
        )
        raise ConfigError(f"policy {policy.name} {lacks}: use one of {able}")
    if config.kv_dtype == "int8":
        raise ConfigError(
            "the torch engine keeps keys and values as the model computes them, not in int8: leave out --kv-dtype"
        )
