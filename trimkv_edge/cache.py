"""The static cache of DESIGN section 3 in torch: the reference that exported graphs are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.eviction import find_policy, plan_moves, policy_of, select_survivors
from trimkv_edge.kv_scales import LEVELS, KVScales
from trimkv_edge.policies.base import KEY, MASS, WINDOW, Entries
from trimkv_edge.pool import PooledCache


def new_cache(
    config: CacheConfig,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    batch: int = 1,
    scales: KVScales | None = None,
) -> StaticCache | PooledCache:
    """An empty float32 cache of the kind that the policy needs.

    Raises:
        ConfigError: settings that the policy cannot honour.
    """
    if find_policy(config.policy).pooled:
        if config.kv_dtype != "float32":
            raise ConfigError(f"policy {config.policy} keeps float32 keys and values only: use --kv-dtype float32")
        return PooledCache(config, num_layers, num_kv_heads, head_dim, batch)
    return StaticCache(config, num_layers, num_kv_heads, head_dim, batch, scales=scales)


class StaticCache:
    """Live entries of every head in a prefix of its slots: ``[0, M)`` kept, ``[M, M + B)`` the ring of new tokens.

    Attributes:
        key, value: per layer, ``[batch, kv_heads, slots, head_dim]``; keys after RoPE.
        log_beta: float32 ``[batch, layers, kv_heads, slots]``.
        positions: int64 ``[batch, layers, kv_heads, slots]``.
        mass: float32, shaped like ``log_beta``: attention received so far; None unless the policy reads it.
        seen: tokens read; live: filled slots, alike in every head.

    Int8 keys and values are held as the float32 numbers that they stand for, float16 ones without rounding.

    Raises:
        ConfigError: a policy whose heads share a budget, settings that the policy cannot honour, or int8 storage
            without scales.
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
        scales: KVScales | None = None,
    ) -> None:
        if (scales is None) == (config.kv_dtype == "int8"):
            raise ConfigError(f"a cache of {config.kv_dtype} keys and values needs its scales, and no other has them")
        self._scales = scales and [
            [torch.from_numpy(x).unsqueeze(1) for x in table] for table in (scales.key, scales.value)
        ]
        self.config = config
        rows = (batch, num_layers, num_kv_heads, config.slots)
        shape = (batch, num_kv_heads, config.slots, head_dim)
        self.key = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.value = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.log_beta = torch.zeros(rows, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.policy = policy_of(config)
        if self.policy.pooled:
            raise ConfigError(f"policy {config.policy} has heads of different lengths: make its cache with new_cache")
        self.mass = torch.zeros(rows, device=device) if MASS in self.policy.reads else None
        # The newest queries: at an event all entries that they saw are still live, so their attention can be redone.
        self._window = self.policy.observes(config)
        self._queries: list[Tensor | None] = [None] * num_layers
        self._scale = 1.0
        self.seen = 0
        self.live = 0

    @property
    def room(self) -> int:
        """Tokens that fit before the next event."""
        return self.config.slots - self.live

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
        if self._scales:
            key, value = (_on_grid(rows, table[layer]) for rows, table in zip((key, value), self._scales, strict=True))
        self.key[layer][:, :, start:end] = key
        self.value[layer][:, :, start:end] = value
        visible = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        keys, values = self.key[layer][:, :, :end], self.value[layer][:, :, :end]
        if self._window:
            held = self._queries[layer]
            newest = query if held is None else torch.cat([held, query], 2)
            self._queries[layer], self._scale = newest[:, :, -self._window :], scale
        if self.mass is not None:
            weights = attention_weights(query, keys, scale, visible)
            self.mass[:, layer, :, start:end] = 0.0
            self.mass[:, layer, :, :end] += weights.sum((2, 3))
            return (weights.to(values.dtype) @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=grouped)
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
            BudgetError: the policy never evicts.
        """
        if self.live != self.config.slots:
            raise StateError(f"eviction runs when {self.config.slots} entries are live, now {self.live} are")
        budget = self.config.budget
        rows = self.log_beta.shape[:-1]
        keep = select_survivors(self.entries(), self.config)
        destination, source = (index.view(*rows, -1) for index in plan_moves(keep, budget))
        for table in (self.log_beta, self.positions, *([] if self.mass is None else [self.mass])):
            table.scatter_(-1, destination, table.gather(-1, source))
        for layer, pair in enumerate(zip(self.key, self.value, strict=True)):
            for rows_of in pair:
                to, origin = (
                    slot[:, layer, :, :, None].expand(-1, -1, -1, rows_of.shape[-1]) for slot in (destination, source)
                )
                rows_of.scatter_(2, to, rows_of.gather(2, origin))
        self.live = budget

    def entries(self) -> Entries:
        """What the policy may look at, once all slots are live."""
        reads, layers = self.policy.reads, len(self.key)
        rows = self.log_beta.shape[:-1]
        return Entries(
            self.log_beta.flatten(0, 2),
            self.positions.flatten(0, 2),
            self.seen,
            layers,
            rows[-1],
            key_score=self._rows([score(key) for key in self.key]) if (score := self.policy.key_score) else None,
            key=self._rows(self.key) if KEY in reads else None,
            mass=self.mass.flatten(0, 2) if self.mass is not None else None,
            window=self._rows([self._window_of(layer) for layer in range(layers)]) if WINDOW in reads else None,
        )

    @staticmethod
    def _rows(by_layer: list[Tensor]) -> Tensor:
        """Per layer ``[batch, kv_heads, ...]`` -> ``[rows, ...]``."""
        return torch.stack(by_layer, 1).flatten(0, 2)

    def _window_of(self, layer: int) -> Tensor:
        """Attention of the newest W queries over all entries, ``[batch, kv_heads, W, slots]``."""
        query = self._queries[layer]
        assert query is not None
        first = self.seen - query.shape[2]
        asked = torch.arange(first, self.seen, device=query.device).view(-1, 1)
        visible = self.positions[:, layer, :, None, None, :] <= asked
        return attention_weights(query, self.key[layer], self._scale, visible).mean(2)

    def reset(self) -> None:
        """Empties the cache."""
        self.seen = 0
        self.live = 0
        self._queries = [None] * len(self.key)


def _on_grid(rows: Tensor, scale: Tensor) -> Tensor:
    """What int8 storage makes of ``rows [batch, kv_heads, T, head_dim]``: see :mod:`trimkv_edge.kv_scales`."""
    return torch.clamp(torch.round(rows / scale), -LEVELS - 1, LEVELS) * scale


def attention_weights(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Softmax weights, for policies that look at them.

    Args:
        query: ``[batch, heads, T, head_dim]``; key: ``[batch, kv_heads, slots, head_dim]``.
        visible: bool, broadcasts to the result.

    Returns:
        float32 ``[batch, kv_heads, group, T, slots]``.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).float()
    logits = scale * grouped @ key.float().unsqueeze(2).transpose(-1, -2)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1)
