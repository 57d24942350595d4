"""Caps of a given generosity, made from what heads were seen to hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import find_policy
from trimkv_edge.policies.base import MODEL

# Caps are multiples of this: narrow differences cost little and keep shapes tidy.
STEP = 8
# Below 1 a quantile of each head's occupancy, from 1 on its maximum times the level.
LADDER = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)

Caps = tuple[tuple[int, ...], ...]


def level_name(level: float) -> str:
    """``p99``, ``max``, ``max x 1.25``."""
    if level < 1:
        return f"p{100 * level:.4g}"
    return "max" if level == 1 else f"max x {level:.4g}"


def caps_at(level: float, kept: npt.NDArray[np.int64], heads: int, config: CacheConfig) -> Caps:
    """The caps of a level, ``[layers][kv_heads]``, each a multiple of 8.

    The same quantile for every head makes an entry more or less cost every head the same share of its events. No cap is
    below what a head must be able to keep, nor above what it ever can; where they would not hold the budget together,
    the heads that are shortest of their mean are raised.

    Args:
        level: see ``LADDER``.
        kept: int64 ``[events, rows]``.
        heads: KV heads of a layer.
        config: without caps.
    """
    rows = kept.shape[1]
    group = rows if find_policy(config.policy).scope == MODEL else heads
    wanted = np.quantile(kept, min(level, 1.0), axis=0, method="higher") * max(level, 1.0)
    low = _up(max(config.min_per_head, config.sinks + config.recent, 1))
    high = max(low, _up(config.budget * group))
    caps = np.clip(_up(wanted), low, high)
    mean = np.maximum(kept.mean(0), 1e-9)
    for start in range(0, rows, group):
        part = slice(start, start + group)
        while caps[part].sum() < config.budget * group:
            caps[start + np.argmin(caps[part] / mean[part])] += STEP
    return tuple(tuple(int(cap) for cap in layer) for layer in caps.reshape(-1, heads))


def _up(entries: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Rounded up to a whole number of steps."""
    return (np.ceil(np.asarray(entries) / STEP) * STEP).astype(np.int64)
