"""What a policy is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trimkv_edge.config import CacheConfig

# What a policy may read beside positions. Attention is known to the eager engine only.
LOG_BETA, KEY_SCORE, KEY, MASS, WINDOW = "log_beta", "key_score", "key", "mass", "window"
_EAGER_ONLY = frozenset([KEY, MASS, WINDOW])
# Whose entries compete for one budget.
HEAD, LAYER, MODEL = "head", "layer", "model"


@dataclass(frozen=True)
class Entries:
    """All entries at an eviction event. Rows are (batch x) layers x KV heads, every slot is live.

    Attributes:
        log_beta: float32 ``[rows, slots]``.
        positions: int64 ``[rows, slots]``, absolute.
        seen: tokens read so far, an int or an int64 tensor that broadcasts.
        layers, heads: a row's number is ``(batch * layers + layer) * heads + head``.
        key_score: float32 ``[rows, slots]``, what the policy's ``key_score`` makes of the keys, layer by layer.
        key: ``[rows, slots, head_dim]``, after RoPE; for policies that read ``key``.
        mass: float32 ``[rows, slots]``, attention received since arrival, summed over queries and the query heads of
            the group; for policies that read ``mass``.
        window: float32 ``[rows, W, slots]``, attention of the newest W queries, averaged over the query heads of the
            group; for policies that read ``window``.
    """

    log_beta: Tensor
    positions: Tensor
    seen: Tensor | int
    layers: int = 1
    heads: int = 1
    key_score: Tensor | None = None
    key: Tensor | None = None
    mass: Tensor | None = None
    window: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """An eviction policy: how entries are scored, and who stays given the scores.

    Attributes:
        name: as in :class:`~trimkv_edge.config.CacheConfig`.
        score: ``(entries, config) -> float32 [rows, slots]``; the lowest leave first.
        reads: what ``score`` needs beside positions.
        key_score: ``[..., slots, head_dim] -> [..., slots]``, for policies that read ``key_score``.
        window: newest queries that ``score`` would like to see, see :meth:`observes`.
        scope: whose entries compete: each KV head's own, those of a layer, or all.
        evicts: False for the full cache.
        scale: size that the rounding error of a score is relative to; None is the score itself, 0 is no error at all.
        sinks: first tokens that never leave where the user does not say.
        source: where the policy comes from.
    """

    name: str
    score: Callable[[Entries, CacheConfig], Tensor]
    reads: frozenset[str] = frozenset()
    key_score: Callable[[Tensor], Tensor] | None = None
    window: int = 0
    scope: str = HEAD
    evicts: bool = True
    scale: float | None = None
    sinks: int = 0
    source: str = ""

    def observes(self, config: CacheConfig) -> int:
        """Newest queries W whose attention is kept: at most the buffer (all that they saw is then still live) and half
        of the budget (a policy that keeps its window would be nothing but a window otherwise)."""
        return min(self.window, config.buffer, max(1, config.budget // 2)) if self.window else 0

    @property
    def pooled(self) -> bool:
        """Whether heads share a budget, so that each may hold another number of entries."""
        return self.scope != HEAD

    @property
    def exports(self) -> bool:
        """Whether graphs can hold it: they never see attention weights, nor the keys of all layers at once."""
        return self.evicts and not self.reads & _EAGER_ONLY
