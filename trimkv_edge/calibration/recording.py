"""Runs of the model over whole streams, and what calibration keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimkv_edge.calibration.lifetimes import Lifetimes
from trimkv_edge.calibration.mixed import MixedReader
from trimkv_edge.config import CacheConfig
from trimkv_edge.models.gated import GatedModel, chunk_positions
from trimkv_edge.models.mixed_sample import Pixels
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.pool import PooledCache

# ``(tokens done, tokens in all)`` of the run under way.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recording:
    """One run.

    Attributes:
        kept: int64 ``[full events x streams, rows]``, entries of each row (layer, KV head) after each event at which
            the pool was full.
        lifetimes: who survived.
        log_beta: float32 ``[streams, layers, tokens, kv_heads]`` of every token read.
    """

    kept: npt.NDArray[np.int64]
    lifetimes: Lifetimes
    log_beta: Tensor


class _Listener(PooledCache):
    """Also keeps a copy of every log-beta that the model hands over."""

    heard: Tensor

    def retain(self, layer: int, log_beta: Tensor) -> None:
        super().retain(layer, log_beta)
        self.heard[:, layer, self.seen : self.seen + log_beta.shape[1]] = log_beta


@torch.no_grad()
def record(
    model: GatedModel,
    config: CacheConfig,
    streams: Tensor,
    batch: int,
    progress: Progress | None = None,
    pictures: Sequence[list[Pixels]] = (),
) -> Recording:
    """Reads streams through the pooled cache, ``batch`` at a time.

    Args:
        model: its gates decide.
        config: of a policy whose heads share a budget; with caps they are honoured, without it is the exact policy.
        streams: int64 ``[streams, tokens]``.
        pictures: of each stream, for a model that reads them; then streams are read one by one.

    Raises:
        ConfigError: caps of another model.
    """
    shape, (count, tokens) = model.config, streams.shape
    layers, heads = shape.num_hidden_layers, shape.num_key_value_heads
    log_beta = torch.zeros(count, layers, tokens, heads)
    lasted, kept = [], []
    batch = 1 if pictures else batch
    for first in range(0, count, batch):
        ids = streams[first : first + batch]
        cache = _Listener(config, layers, heads, model.head_dim, len(ids))
        cache.heard = log_beta[first : first + batch]
        lifetimes = Lifetimes(len(ids), layers * heads, tokens)
        mixed = MixedReader(model, pictures[first]) if isinstance(model, GatedVisionModel) and pictures else None
        while cache.seen < tokens:
            part = ids[:, cache.seen : cache.seen + min(config.prefill_chunk, cache.room)]
            if mixed is None:
                model(part, chunk_positions(cache.seen, part.shape[1]), cache)
            else:
                mixed.read(part, cache)
            cache.advance(part.shape[1])
            if cache.room == 0:
                cache.evict()
                lifetimes.note(cache)
                if cache.seen >= config.slots:
                    kept.append(cache.kept.flatten(1).numpy().copy())
            if progress:
                progress(first * tokens + len(ids) * cache.seen, count * tokens)
        lasted.append(lifetimes.lasted)
    whole = Lifetimes(0, layers * heads, tokens)
    whole.lasted, whole.seen = torch.cat(lasted), lifetimes.seen
    return Recording(np.concatenate(kept), whole, log_beta)
