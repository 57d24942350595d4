"""Attention backends of the ExecuTorch target: append a chunk at the live length, attend over the live prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimkv_edge.export.executorch_cache import MASKED, LlamaCache, PortableCache
from trimkv_edge.models.gated import GatedModel, chunk_positions


class Step(ABC):
    """One forward pass, an :class:`~trimkv_edge.models.attention.AttentionBackend` of a model whose gates are apart.

    Attributes:
        read: what the gate of each layer would read, float32 ``[1, T, hidden_size]``.
    """

    def __init__(self) -> None:
        self.read: list[Tensor] = []

    def retain(self, layer: int, rows: Tensor) -> None:
        """Takes what the layer's gate would read, see :func:`~trimkv_edge.export.gates_apart.gates_apart`."""
        self.read.append(rows)

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See the backend."""


class LlamaStep(Step):
    """One forward pass through ``llama::update_cache`` and ``llama::custom_sdpa``; no mask, no copy of the cache.

    Args:
        cache: the buffers.
        live: int64 ``[1]``, filled slots before the chunk.
        count: tokens T of the chunk.
    """

    def __init__(self, cache: LlamaCache, live: Tensor, count: int) -> None:
        super().__init__()
        self.cache = cache
        self.count = count
        start = live[0].item()
        torch._check(start >= 0)
        torch._check(start + count <= cache.config.slots)
        self.start = start

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See the base."""
        cache, ops = self.cache, torch.ops.llama
        heads, width = cache.heads, cache.head_dim
        for table, new in ((cache.key(layer), key), (cache.value(layer), value)):
            ops.update_cache(new.transpose(1, 2).reshape(1, self.count * heads, 1, width), table, self.start * heads)
        keys, values = (table.view(1, -1, heads, width) for table in (cache.key(layer), cache.value(layer)))
        out: Tensor = ops.custom_sdpa(query.transpose(1, 2), keys, values, self.start, None, 0.0, True, scale)
        return out


class PortableStep(Step):
    """One forward pass in core ATen operators; arguments as for :class:`LlamaStep`."""

    def __init__(self, cache: PortableCache, live: Tensor, count: int) -> None:
        super().__init__()
        self.cache = cache
        self.count = count
        self.slots = live + torch.arange(count, dtype=torch.int64)
        visible = torch.arange(cache.config.slots, dtype=torch.int64) <= self.slots.unsqueeze(1)
        self.bias = torch.where(visible, 0.0, MASKED)

    def _write(self, table: Tensor, new: Tensor) -> None:
        """``new``: ``[1, T, heads, width]``."""
        heads, width = new.shape[2:]
        first = torch.arange(heads, dtype=torch.int64) * self.cache.config.slots
        rows = self.slots.unsqueeze(1) + first
        table.index_put_((rows.reshape(-1),), new.reshape(self.count * heads, width))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See the base. The cache is the left factor, so that no transposed copy of it is made."""
        heads, width, count = self.cache.heads, self.cache.head_dim, self.count
        self._write(self.cache.key(layer), key.transpose(1, 2))
        self._write(self.cache.value(layer), value.transpose(1, 2))
        keys, values = (table.view(heads, -1, width) for table in (self.cache.key(layer), self.cache.value(layer)))
        groups = query.shape[1] // heads
        grouped = (query[0] * scale).contiguous().view(heads, groups * count, width)
        scores = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2)
        scores = scores.reshape(heads, groups, count, -1) + self.bias
        weights = torch.softmax(scores, dim=-1).reshape(heads, groups * count, -1)
        out = torch.bmm(weights, values).view(heads, groups, count, width)
        return out.permute(2, 0, 1, 3).reshape(1, count, heads * groups, width)


class Forward(nn.Module):
    """``(input_ids int64 [1, T], position int64 [1], live int64 [1]) -> logits [1, 1, vocabulary]``, and what each
    layer's gate reads, ``[1, T, hidden_size]``.

    Args:
        model: the decoder, traced with its gates apart (:mod:`~trimkv_edge.export.gates_apart`).
        cache: the buffers.
        make_step: ``(cache, live, T)`` -> what appends and attends.
        gated: whether there are gates.
    """

    def __init__(
        self, model: GatedModel, cache: nn.Module, make_step: Callable[[Any, Tensor, int], Step], *, gated: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.make_step = make_step
        self.gated = gated

    def forward(self, input_ids: Tensor, position: Tensor, live: Tensor) -> tuple[Tensor, ...]:
        count = input_ids.shape[1]
        step = self.make_step(self.cache, live, count)
        logits = self.model(input_ids, chunk_positions(position, count), step)
        return logits, *(step.read if self.gated else ())


class CacheMethod(nn.Module):
    """One method of the cache as a program's entry point; the cache has the same name in all of them."""

    def __init__(self, cache: nn.Module, name: str) -> None:
        super().__init__()
        self.cache = cache
        self.name = name

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = getattr(self.cache, self.name)(*args)
        return result
