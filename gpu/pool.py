"""The pool of a budget that heads share, on a device: each head's entries back to back, its lengths beside them."""

from __future__ import annotations

import torch
from torch import Tensor

import trimkv_edge.gpu.ops  # noqa: F401  the custom ops
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.pool import PooledCache


class DevicePool:
    """A :class:`~trimkv_edge.pool.PooledCache` of one stream with what its graphs read and write.

    Steps are counted on the device and on the host alike. An event looks at the longest head's length, so it waits for
    the device once; steps never do.

    Attributes:
        cache: the core's pool, which runs the events.
        key, value: ``[entries, head_dim]``; log_beta: float32 ``[entries]``; positions: int64, alike.
        start, length: int64 ``[layers, kv_heads]``, where each head's entries lie and how many there are.
        seen: int64 ``[1]``, tokens read.

    Raises:
        ConfigError: settings that the policy cannot honour, caps of another model, or int8 keys and values.
    """

    def __init__(
        self,
        config: CacheConfig,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.kv_dtype == "int8":
            raise ConfigError("a budget that heads share has no int8 keys and values: leave out --kv-dtype")
        self.cache = PooledCache(config, num_layers, num_kv_heads, head_dim, dtype=dtype, device=device)
        self.key, self.value, self.log_beta, self.positions = (
            table[0] for table in (self.cache.key, self.cache.value, self.cache.log_beta, self.cache.positions)
        )
        self.start, self.length = (
            torch.zeros(num_layers, num_kv_heads, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.seen = torch.zeros(1, dtype=torch.int64, device=device)
        tables = (self.key, self.value, self.log_beta, self.positions)
        for tensor in (*tables, self.start, self.length, self.seen):
            torch._dynamo.mark_static_address(tensor)
        self.sync()

    def sync(self) -> None:
        """Lengths on the device as the host counts them."""
        self.start.copy_(self.cache.places(1)[0, ..., 0])
        self.length.copy_(self.cache.kept[0] + self.cache.fill)
        self.seen.fill_(self.cache.seen)


class PooledAttention:
    """An :class:`~trimkv_edge.models.attention.AttentionBackend` for ``T`` right-aligned tokens of one stream.

    Each token of a chunk is a row of its own in ``trimkv::attend_pool``, which sees one entry more than the one before.

    Args:
        pool: every head has ``max(count, 1)`` free slots in its ring.
        count: int64 ``[1]``, tokens of the chunk that are its own, 0 to T.
        length: T.
    """

    def __init__(self, pool: DevicePool, count: Tensor, length: int) -> None:
        self._pool, self._count = pool, count
        first = length - count.clamp(min=1)
        self._from = torch.maximum(torch.arange(length, device=count.device), first)
        self._ahead = self._from - first

    def positions(self) -> Tensor:
        """Absolute positions of the chunk, int64 ``[1, T]``; those of padding are of its first own token."""
        return (self._pool.seen + self._ahead).unsqueeze(0)

    def advance(self) -> None:
        """Counts the chunk, which every layer has written, and notes its positions for all layers and heads."""
        pool = self._pool
        slots = pool.start.unsqueeze(-1) + pool.length.unsqueeze(-1) + self._ahead
        pool.positions[slots] = (pool.seen + self._ahead).expand_as(slots)
        pool.length += self._count
        pool.seen += self._count

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Stores the chunk's log-betas, float32 ``[1, T, kv_heads]``."""
        self._pool.log_beta[self._slots(layer)] = log_beta[0, self._from].transpose(0, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query ``[1, heads, T, head_dim]``, key and value ``[1, kv_heads, T, head_dim]`` (after RoPE) ->
        ``[1, T, heads, head_dim]``."""
        pool, slots = self._pool, self._slots(layer)
        for table, rows in ((pool.key, key), (pool.value, value)):
            table[slots] = rows[0, :, self._from].to(table.dtype)
        rows = query[0].transpose(0, 1).unsqueeze(2).contiguous()
        seen = pool.length[layer] + (self._ahead + 1).unsqueeze(1)
        start = pool.start[layer].expand_as(seen).contiguous()
        out: Tensor = torch.ops.trimkv.attend_pool(rows, pool.key, pool.value, start, seen, scale)
        return out.transpose(0, 1)

    def _slots(self, layer: int) -> Tensor:
        """``[kv_heads, T]``."""
        pool = self._pool
        return (pool.start[layer] + pool.length[layer]).unsqueeze(1) + self._ahead
