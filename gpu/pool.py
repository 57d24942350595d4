"""The pools of a budget that heads share, on a device: each head's entries back to back, its lengths beside them."""

from __future__ import annotations

import torch
from torch import Tensor

import trimkv_edge.gpu.ops  # noqa: F401  the custom ops
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.gpu.chunk import RightAligned
from trimkv_edge.pool import PooledCache


class DevicePool:
    """A :class:`~trimkv_edge.pool.PooledCache` for each stream of a batch, with what its graphs read and write.

    Steps are counted on the device and on the host alike. An event looks at the longest head's length, so it waits for
    the device once; steps never do.

    Attributes:
        caches: the core's pools, one for each stream, which run the events; N entries each.
        key, value: ``[batch * N, head_dim]``; log_beta: float32 ``[batch * N]``; positions: int64, alike.
        start, length: int64 ``[batch, layers, kv_heads]``, where each head's entries lie and how many there are.
        seen: int64 ``[batch]``, tokens read.

    Raises:
        ConfigError: settings that the policy cannot honour, caps of another model, or int8 keys and values.
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
        if config.kv_dtype == "int8":
            raise ConfigError("a budget that heads share has no int8 keys and values: leave out --kv-dtype")
        if batch < 1:
            raise ConfigError(f"batch is {batch}, but must be at least 1")
        whole = PooledCache(config, num_layers, num_kv_heads, head_dim, batch, dtype, device)
        self.config = config
        self.caches = [whole.stream(row) for row in range(batch)]
        self.key, self.value, self.log_beta, self.positions = (
            table.flatten(0, 1) for table in (whole.key, whole.value, whole.log_beta, whole.positions)
        )
        self.start, self.length = (
            torch.zeros(batch, num_layers, num_kv_heads, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        tables = (self.key, self.value, self.log_beta, self.positions)
        for tensor in (*tables, self.start, self.length, self.seen):
            torch._dynamo.mark_static_address(tensor)
        for row in range(batch):
            self.sync(row)

    def sync(self, row: int) -> None:
        """A stream's lengths on the device as the host counts them."""
        cache = self.caches[row]
        self.start[row] = self.places(row, 1)[..., 0]
        self.length[row] = cache.kept[0] + cache.fill
        self.seen[row] = cache.seen

    def places(self, row: int, width: int) -> Tensor:
        """Places in the tables of the first ``width`` slots of a stream's heads, ``[layers, kv_heads, width]``."""
        cache = self.caches[row]
        return cache.places(width)[0] + row * cache.positions.shape[1]


class PooledAttention:
    """An :class:`~trimkv_edge.models.attention.AttentionBackend` for one forward pass of right-aligned chunks.

    Each token of a chunk is a row of its own in ``trimkv::attend_pool``, which sees one entry more than the one before.

    Args:
        pool: every head of stream b has ``max(count[b], 1)`` free slots in its ring.
        count: int64 ``[batch]``, tokens of the chunk that are its own, 0 to T.
        length: T.
    """

    def __init__(self, pool: DevicePool, count: Tensor, length: int) -> None:
        self._pool, self._chunk = pool, RightAligned(count, length)

    def positions(self) -> Tensor:
        """Absolute positions of the chunk, int64 ``[batch, T]``; those of padding are of its first own token."""
        return self._pool.seen.unsqueeze(1) + self._chunk.ahead

    def advance(self) -> None:
        """Counts the chunk, which every layer has written, and notes its positions for all layers and heads."""
        pool = self._pool
        slots = (pool.start + pool.length).unsqueeze(-1) + self._chunk.ahead[:, None, None]
        pool.positions[slots] = self.positions()[:, None, None].expand_as(slots)
        pool.length += self._chunk.count[:, None, None]
        pool.seen += self._chunk.count

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Stores the chunk's log-betas, float32 ``[batch, T, kv_heads]``."""
        self._pool.log_beta[self._slots(layer)] = self._chunk.own(log_beta.transpose(1, 2))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query ``[batch, heads, T, head_dim]``, key and value ``[batch, kv_heads, T, head_dim]`` (after RoPE) ->
        ``[batch, T, heads, head_dim]``."""
        pool, slots = self._pool, self._slots(layer)
        for table, rows in ((pool.key, key), (pool.value, value)):
            table[slots] = self._chunk.own(rows).to(table.dtype)
        batch, heads, count, width = query.shape
        rows = query.transpose(1, 2).reshape(batch * count, heads, 1, width)
        seen = pool.length[:, layer].unsqueeze(1) + (self._chunk.ahead + 1).unsqueeze(2)
        start = pool.start[:, layer].unsqueeze(1).expand_as(seen)
        out: Tensor = torch.ops.trimkv.attend_pool(
            rows, pool.key, pool.value, start.reshape(batch * count, -1), seen.reshape(batch * count, -1), scale
        )
        return out.view(batch, count, heads, width)

    def _slots(self, layer: int) -> Tensor:
        """``[batch, kv_heads, T]``."""
        pool = self._pool
        return (pool.start[:, layer] + pool.length[:, layer]).unsqueeze(-1) + self._chunk.ahead.unsqueeze(1)
