"""Reads many streams in step through the reference cache, and scores what is predicted: the engine of `evaluate`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.models.gated import GatedModel


def make_cache(model: GatedModel, config: CacheConfig, rows: int) -> StaticCache:
    """An empty cache for `rows` streams."""
    shape = model.config
    return StaticCache(config, shape.num_hidden_layers, shape.num_key_value_heads, model.head_dim, batch=rows)


def full_cache(model: GatedModel, tokens: int, rows: int, chunk: int = 128) -> StaticCache:
    """A cache that holds all of `tokens`: nothing is ever evicted from it."""
    return make_cache(model, CacheConfig(budget=tokens, buffer=chunk, prefill_chunk=chunk), rows)


@torch.no_grad()
def read(model: GatedModel, cache: StaticCache, ids: Tensor) -> Iterator[Tensor]:
    """Feeds ids [R, T] by chunks, evicting whenever the slots are full; yields logits [R, t, V] per chunk."""
    start = 0
    while start < ids.shape[1]:
        step = min(cache.config.prefill_chunk, cache.config.slots - cache.live)
        part = ids[:, start : start + step]
        positions = (torch.arange(part.shape[1]) + cache.seen).unsqueeze(0)
        yield model(part, positions, cache, last_only=False)
        cache.advance(part.shape[1])
        if cache.live == cache.config.slots:
            cache.evict()
        start += part.shape[1]
