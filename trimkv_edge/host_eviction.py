"""The eviction event in numpy, for a host that drives a compiled graph (docs/npu.md). No torch.

The same survivors in the same slots as :mod:`trimkv_edge.eviction`, whose torch operators are for graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ConfigError

BoolArray = npt.NDArray[np.bool_]
# What the settings protect stands above every score, as in trimkv_edge.policies.selection.
_PROTECTED = np.float32(3.0e38)
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class HostEntries:
    """All entries at an event, every slot live.

    Attributes:
        log_beta: float32 ``[layers, kv_heads, slots]``.
        positions: int64, same shape, absolute.
        key: ``[layers, kv_heads, slots, head_dim]``, after RoPE.
        seen: tokens read so far.
    """

    log_beta: FloatArray
    positions: IntArray
    key: npt.NDArray[np.generic]
    seen: int


def log_sigmoid(logits: npt.ArrayLike) -> FloatArray:
    """``log(sigmoid(z))`` in float64, rounded once to float32, so that hosts in every language get the same number."""
    z = np.asarray(logits, np.float64)
    return (np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))).astype(np.float32)


def _trimkv(entries: HostEntries) -> FloatArray:
    age = (entries.seen + 1 - entries.positions).astype(np.float32)
    with np.errstate(over="ignore"):
        return entries.log_beta * age


def _streaming(entries: HostEntries) -> FloatArray:
    return entries.positions.astype(np.float32)


def _random(entries: HostEntries) -> FloatArray:
    """A hash in integers; see :mod:`trimkv_edge.policies.random`."""
    layers, heads = entries.positions.shape[:2]
    row = np.arange(layers * heads, dtype=np.int64).reshape(layers, heads, 1)
    prime = 2**31 - 1
    mixed = ((entries.positions + 1) * 48271 + (row + 1) * 1_664_525) % prime
    mixed = (mixed * mixed + 69_621) % prime
    mixed = (mixed * mixed + mixed) % prime
    return (mixed % 2**24).astype(np.float32)


def _keydiff(entries: HostEntries) -> FloatArray:
    """Minus the cosine between each key and the mean direction of its head's keys."""
    key = entries.key.astype(np.float32)
    unit = key / np.sqrt((key * key).sum(-1, keepdims=True) + _TINY)
    anchor = unit.mean(-2, keepdims=True)
    scores: FloatArray = -(unit * anchor).sum(-1) / np.sqrt((anchor * anchor).sum(-1) + _TINY)
    return scores


SCORES: dict[str, Callable[[HostEntries], FloatArray]] = {
    "trimkv": _trimkv,
    "streaming": _streaming,
    "keydiff": _keydiff,
    "random": _random,
}


def require_host(config: CacheConfig) -> None:
    """Raises :class:`ConfigError` for settings that a host does not run: shared budgets, look-ahead, other policies."""
    able = ", ".join(SCORES)
    if config.caps is not None or config.policy in ("global", "layer"):
        raise ConfigError(
            f"policy {config.policy} has a budget that heads share, which a host-evicted graph does not have yet: "
            f"use one of {able}, or --target executorch onnx"
        )
    if config.policy not in SCORES:
        raise ConfigError(f"policy {config.policy!r} is not one that a host runs: use one of {able}")
    if config.lookahead != 1:
        raise ConfigError(f"lookahead is {config.lookahead}, but a host has the single-step score only: use 1")


def score(entries: HostEntries, config: CacheConfig) -> FloatArray:
    """The policy's scores with ``sinks`` and ``recent`` lifted above all others; the lowest leave first."""
    scores = SCORES[config.policy](entries)
    safe = (entries.positions < config.sinks) | (entries.positions >= entries.seen - config.recent)
    return np.where(safe, _PROTECTED, scores)


def leaving(scores: FloatArray, positions: IntArray, count: int) -> BoolArray:
    """Marks the ``count`` entries of each head that leave: the lowest scores, and of equal scores the older entries."""
    order = np.lexsort((positions, scores), axis=-1)
    marks = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(marks, order[..., :count], True, axis=-1)
    return marks


def moves(leaves: BoolArray, budget: int) -> tuple[IntArray, IntArray, IntArray]:
    """Row moves that bring the survivors into the first ``budget`` slots, at most ``slots - budget`` for each head.

    The holes of the prefix, in slot order, take the ring's survivors, in slot order.

    Args:
        leaves: ``[layers, kv_heads, slots]``, True ``slots - budget`` times for each head.

    Returns:
        ``(row, to, source)``, int64 ``[moves]``; row = layer * kv_heads + head.
    """
    by_row = leaves.reshape(-1, leaves.shape[-1])
    # Each head has as many holes as survivors in its ring, so the two lists pair up across heads.
    row, to = np.nonzero(by_row[:, :budget])
    _, source = np.nonzero(~by_row[:, budget:])
    return row, to, source + budget
