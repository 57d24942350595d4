"""The selection alone, on log-betas that a run recorded: what other caps would have kept, without the model."""

from __future__ import annotations

from torch import Tensor

from trimkv_edge.calibration.lifetimes import Lifetimes
from trimkv_edge.calibration.recording import Progress
from trimkv_edge.config import CacheConfig
from trimkv_edge.pool import PooledCache


def replay(log_beta: Tensor, config: CacheConfig, progress: Progress | None = None) -> Lifetimes:
    """Runs the events of :class:`~trimkv_edge.pool.PooledCache`, whose keys stay empty.

    With the settings of the recorded run the result is its own lifetimes; with other caps it is close to what the
    model would keep, whose later log-betas change a little with what it forgot.

    Args:
        log_beta: float32 ``[streams, layers, tokens, kv_heads]``.
        config: settings, caps included.

    Raises:
        ConfigError: caps of another model.
    """
    streams, layers, tokens, heads = log_beta.shape
    cache = PooledCache(config, layers, heads, 1, streams)
    lifetimes = Lifetimes(streams, layers * heads, tokens)
    while cache.seen < tokens:
        part = log_beta[:, :, cache.seen : cache.seen + cache.room]
        for layer in range(layers):
            cache.retain(layer, part[:, layer])
        cache.advance(part.shape[2])
        if cache.room == 0:
            cache.evict()
            lifetimes.note(cache)
        if progress:
            progress(streams * cache.seen, streams * tokens)
    return lifetimes
