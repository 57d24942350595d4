"""Reads streams through a bounded cache and says which asked-for tokens the model would have produced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimkv_edge.cache import new_cache
from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine, FloatArray
from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.samples import Sample
from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.gated import GatedModel

Progress = Callable[[int], None]


class Reader(Protocol):
    """Scores streams. ``hit[i]`` says that greedy decoding gives answer ``i`` exactly: every token of it is the most
    likely one after the tokens before it (so decoding, started before the answer, walks along it). ``nats[i]`` is the
    answer's negative log-likelihood. One pair of arrays per sample."""

    def score(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]: ...


def _fold(
    sample: Sample, right: npt.NDArray[np.bool_], nats: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Per token of the stream -> per answer."""
    hit = np.array([bool(right[a.start : a.end].all()) for a in sample.answers])
    return hit, np.array([float(nats[a.start : a.end].sum()) for a in sample.answers])


def _wanted(sample: Sample) -> npt.NDArray[np.bool_]:
    """Which tokens of the stream have to be predicted."""
    wanted = np.zeros(len(sample.ids), dtype=bool)
    for answer in sample.answers:
        if not 0 < answer.start < answer.end <= len(sample.ids):
            raise ConfigError(f"answer [{answer.start}, {answer.end}) does not lie in a stream of {len(sample.ids)}")
        wanted[answer.start : answer.end] = True
    return wanted


class EagerReader:
    """Many streams in step through the reference cache.

    Args:
        model: gated model.
        config: cache settings.
        batch: most streams at once.
    """

    def __init__(self, model: GatedModel, config: CacheConfig, batch: int = 16) -> None:
        self.model, self.config, self.batch = model, config, batch

    def score(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """See :class:`Reader`; all samples of one call have the same length."""
        found = []
        for start in range(0, len(samples), self.batch):
            group = samples[start : start + self.batch]
            ids = torch.tensor([sample.ids for sample in group])
            wanted = torch.from_numpy(np.stack([_wanted(sample) for sample in group]))
            right, nats = self._read(ids, wanted, progress)
            found += [_fold(sample, right[row], nats[row]) for row, sample in enumerate(group)]
        return found

    @torch.no_grad()
    def _read(
        self, ids: Tensor, wanted: Tensor, progress: Progress | None
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        shape, config, base = self.model.config, self.config, self.model.base
        cache = new_cache(config, shape.num_hidden_layers, shape.num_key_value_heads, self.model.head_dim, len(ids))
        right = np.zeros(ids.shape, dtype=bool)
        nats = np.zeros(ids.shape)
        start = 0
        while start < ids.shape[1]:
            part = ids[:, start : start + min(config.prefill_chunk, cache.room)]
            end = start + part.shape[1]
            positions = torch.arange(start, end).unsqueeze(0)
            hidden = base.model(
                input_ids=part, position_ids=positions, use_cache=False, **{BACKEND_KEYWORD: cache}
            ).last_hidden_state
            # Hidden state t predicts token t + 1; logits are made only where they are asked for.
            row, offset = wanted[:, start + 1 : end + 1].nonzero(as_tuple=True)
            if len(row):
                logits = base.lm_head(hidden[row, offset]).float()
                target = ids[row, start + 1 + offset]
                loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
                where = (row.numpy(), (start + 1 + offset).numpy())
                right[where] = (logits.argmax(-1) == target).numpy()
                nats[where] = loss.numpy()
            cache.advance(part.shape[1])
            if cache.room == 0 and end < ids.shape[1]:
                cache.evict()
            start = end
            if progress:
                progress(part.numel())
        return right, nats


def score_token(logits: FloatArray, token: int) -> tuple[float, bool]:
    """Log-probability of ``token`` in nats, and whether it is the most likely one."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(wide[token] - top - np.log(np.exp(wide - top).sum())), bool(wide.argmax() == token)


class EngineReader:
    """One stream after another through any :class:`~trimkv_edge.engine.Engine`, an exported artefact's too."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """See :class:`Reader`."""
        found = []
        for sample in samples:
            wanted = _wanted(sample)
            right = np.zeros(len(sample.ids), dtype=bool)
            nats = np.zeros(len(sample.ids))
            self.engine.reset()
            start = 0
            for stop in [*np.flatnonzero(wanted).tolist(), len(sample.ids)]:
                logits = self._feed(sample.ids[start:stop])
                start = stop
                if stop < len(sample.ids):
                    token = sample.ids[stop]
                    log_probability, right[stop] = score_token(logits, token)
                    nats[stop] = -log_probability
            found.append(_fold(sample, right, nats))
            if progress:
                progress(len(sample.ids))
        return found

    def _feed(self, ids: Sequence[int]) -> FloatArray:
        engine, done = self.engine, 0
        logits = np.zeros(0, np.float32)
        while done < len(ids):
            if engine.room == 0:
                engine.evict()
            count = min(engine.room, engine.config.prefill_chunk, len(ids) - done)
            logits = engine.prefill(ids[done : done + count])
            done += count
        return logits
