"""What a calibration is asked for: checks before anything is loaded, sizes, memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_edge.budget import DTYPE_BYTES, ModelShape, cache_bytes, estimate_memory
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import policy_of
from trimkv_edge.policies import POLICIES

TARGET = 0.99
# Streams are read together while their caches take no more than this, and at most 8 of them.
_BATCH_BYTES, _MOST_AT_ONCE = 2**30, 8


def check_request(config: CacheConfig, target: float, dtype: str) -> None:
    """What can be checked before anything is loaded.

    Raises:
        ConfigError: the policy shares no budget, there are caps already, or target or dtype are not possible.
    """
    if not policy_of(config).pooled:
        pooled = " or ".join(name for name, policy in POLICIES.items() if policy.pooled)
        raise ConfigError(
            f"policy {config.policy} gives every head the same budget, so it needs no caps: choose --policy {pooled}"
        )
    if config.caps is not None:
        raise ConfigError("the settings have caps already: calibrate without them")
    if not 0 < target <= 1:
        raise ConfigError(f"target is {target:g}, but must be above 0 and at most 1: for example 0.99 or 99%")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")


def default_length(config: CacheConfig) -> int:
    """Tokens of a stream: the pool is full for most of them."""
    return max(2048, 6 * config.slots)


def stack_streams(streams: Sequence[Sequence[int]], config: CacheConfig, position_limit: int) -> Tensor:
    """Streams as int64 ``[streams, tokens]``.

    Raises:
        ConfigError: no streams, of several lengths, too short to fill the pool, or too long for the model.
    """
    lengths = sorted({len(stream) for stream in streams})
    if len(lengths) != 1:
        raise ConfigError(f"calibration needs streams of one length, but they have {lengths or 'none'}")
    if lengths[0] < config.slots:
        raise ConfigError(
            f"streams of {lengths[0]} tokens never fill a budget of {config.budget} and a buffer of {config.buffer}: "
            f"read at least {config.slots} tokens, better {default_length(config)} (--tokens), or lower --budget"
        )
    if lengths[0] > position_limit:
        raise ConfigError(
            f"streams of {lengths[0]} tokens pass the model's last position {position_limit}: lower --tokens"
        )
    return torch.tensor([list(stream) for stream in streams])


def streams_at_once(shape: ModelShape, config: CacheConfig) -> int:
    """Streams that are read together."""
    return max(1, min(_MOST_AT_ONCE, _BATCH_BYTES // cache_bytes(shape, config, "float32")))


def memory_to_calibrate(shape: ModelShape, config: CacheConfig) -> int:
    """Bytes: weights in float32, and cache and workspace of each stream that is read at once."""
    one = estimate_memory(shape, config, "float32")
    return one.weights + streams_at_once(shape, config) * (one.cache + one.workspace)
