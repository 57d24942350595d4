"""A reference for models whose float32 weights do not fit: one layer at a time over the whole stream.

Under a budget for each head a layer's evictions depend on that layer alone, so with the tokens known beforehand layers
can be run one after the other, each over all chunks and events, and only one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import CacheState, Engine, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.family import text_decoder


class _OneLayer:
    """Hands a layer of any index to a cache of one."""

    def __init__(self, cache: StaticCache) -> None:
        self.cache = cache

    def retain(self, layer: int, log_beta: Tensor) -> None:
        self.cache.retain(0, log_beta)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return self.cache.attend(0, query, key, value, scale)


class LayerwiseReference(Engine):
    """Plays back what the eager model does with one given stream in given chunks.

    Keys and values at each event are kept on disk, so memory is one layer and the stream's activations.

    Args:
        weights: of the model.
        config: cache settings, with a budget for each head.
        tokens: the stream; chunk after chunk of ``plan`` is read from it.
        plan: chunk lengths; events fall between chunks.
        folder: for the entries at each event, ``2 * slots * layers * kv_heads * head_dim`` floats each.
        progress: called with (layers done, layers in all).
        scales: of int8 keys and values.
    """

    name = "eager"

    def __init__(
        self,
        weights: ReferenceWeights,
        config: CacheConfig,
        tokens: Sequence[int],
        plan: Sequence[int],
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
        scales: KVScales | None = None,
    ) -> None:
        super().__init__(config, position_limit=POSITION_LIMIT, **weights.model.sizes)
        self._scales = scales
        self._tokens = np.asarray(tokens[: sum(plan)], np.int64)
        self._ends = np.cumsum(plan)
        self._due = _events(config, plan)
        rows = (self.num_layers, self.num_kv_heads, config.slots)
        self._before = [_Entries(folder / f"event-{index}", rows, self.head_dim) for index in range(len(self._due))]
        self._kept = np.zeros((len(self._due), *rows[:2], config.budget), np.int64)
        self._logits = self._run(weights, progress)
        self._step = self._event = 0

    @torch.no_grad()
    def _run(self, weights: ReferenceWeights, progress: Callable[[int, int], None] | None) -> FloatArray:
        inner = text_decoder(weights.model.base)
        hidden, angles = self._inputs(weights, torch.from_numpy(self._tokens).unsqueeze(0))
        for index, layer in enumerate(inner.layers):
            hidden = self._behind(index, self._run_layer(index, weights.fill(layer), hidden, angles))
            if progress:
                progress(index + 1, self.num_layers)
        last = weights.fill(inner.norm)(hidden[:, self._ends - 1])
        logits: FloatArray = weights.fill(weights.model.base.lm_head)(last)[0].numpy()
        return logits

    def _inputs(self, weights: ReferenceWeights, stream: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of the first layer: hidden states ``[1, tokens, hidden_size]`` and the rotary tables."""
        decoder = text_decoder(weights.model.base)
        hidden = weights.fill(decoder.embed_tokens)(stream)
        return hidden, decoder.rotary_emb(hidden, position_ids=torch.arange(stream.shape[1]).unsqueeze(0))

    def _behind(self, index: int, hidden: Tensor) -> Tensor:
        """What the layer after ``index`` reads."""
        return hidden

    def _run_layer(self, index: int, layer: torch.nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        own = self._scales and KVScales(self._scales.key[[index]], self._scales.value[[index]])
        cache = StaticCache(self.config, 1, self.num_kv_heads, self.head_dim, scales=own)
        out, start = [], 0
        for step, end in enumerate(self._ends.tolist()):
            chunk = slice(start, end)
            keywords = {BACKEND_KEYWORD: _OneLayer(cache)}
            out.append(layer(hidden[:, chunk], position_embeddings=tuple(x[:, chunk] for x in angles), **keywords))
            cache.advance(end - start)
            if step in self._due:
                event = self._due.index(step)
                self._before[event].store(index, cache)
                cache.evict()
                self._kept[event, index] = cache.positions[0, 0, :, : self.config.budget].numpy()
            start = end
        return torch.cat(out, 1)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        if not np.array_equal(ids, self._tokens[position : position + ids.size]) or (
            position + ids.size != self._ends[self._step]
        ):
            raise StateError("this reference plays back one stream: feed it the chunks that it was made with")
        self._step += 1
        return self._logits[self._step - 1]

    def _evict(self, seen: int) -> None:
        self._event += 1

    def _reset(self) -> None:
        self._step = self._event = 0

    def _kept_positions(self) -> IntArray:
        if self._event:
            return self._kept[self._event - 1]
        first = np.arange(self.config.budget, dtype=np.int64)
        return np.broadcast_to(first, (self.num_layers, self.num_kv_heads, first.size))

    def state(self) -> CacheState:
        """The live entries; keys and values before an event are mapped files, not copies."""
        return CacheState(self.seen, *self._read(), self.survivors(), cursor=self.cursor)

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """At an event, right before or right after it."""
        if self.live == self.config.slots:
            held = self._before[self._event]
            key, value = held.tables()
            return key, value, held.log_beta
        if self.live != self.config.budget or not self._event:
            raise StateError("this reference has states at events only")
        held = self._before[self._event - 1]
        order = np.argsort(held.positions, -1)
        rank = _search(np.take_along_axis(held.positions, order, -1), self._kept[self._event - 1])
        slot = np.take_along_axis(order, rank, -1)
        key, value = held.rows(slot)
        return key, value, np.take_along_axis(held.log_beta, slot, -1)

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        raise StateError("this reference plays back one stream: it takes no state")


class _Entries:
    """All slots at one event, stored layer by layer; keys and values lie in files."""

    def __init__(self, path: Path, rows: tuple[int, ...], head_dim: int) -> None:
        self._files = [path.with_suffix(f".{kind}") for kind in ("key", "value")]
        self._shape = (*rows, head_dim)
        self.log_beta = np.zeros(rows, np.float32)
        self.positions = np.zeros(rows, np.int64)

    def store(self, layer: int, cache: StaticCache) -> None:
        """Layers come in order."""
        for path, rows in zip(self._files, (cache.key, cache.value), strict=True):
            with path.open("ab") as file:
                rows[0][0].numpy().tofile(file)
        self.log_beta[layer] = cache.log_beta[0, 0].numpy()
        self.positions[layer] = cache.positions[0, 0].numpy()

    def tables(self) -> list[FloatArray]:
        """Keys and values, mapped for as long as they are used."""
        return [np.memmap(path, np.float32, "r", shape=self._shape) for path in self._files]

    def rows(self, slot: IntArray) -> list[FloatArray]:
        """Copies of some rows of both, ``slot``: ``[layers, kv_heads, rows]``. One layer is mapped at a time."""
        found = [np.empty((*slot.shape, self._shape[-1]), np.float32) for _ in self._files]
        size = 4 * int(np.prod(self._shape[1:]))
        for layer, wanted in enumerate(slot):
            for path, rows in zip(self._files, found, strict=True):
                table = np.memmap(path, np.float32, "r", layer * size, self._shape[1:])
                rows[layer] = np.take_along_axis(table, wanted[..., None], 1)
        return found


def _events(config: CacheConfig, plan: Sequence[int]) -> list[int]:
    """Indexes of the chunks that an event follows."""
    live, found = 0, []
    for index, size in enumerate(plan):
        live += size
        if live == config.slots:
            found.append(index)
            live = config.budget
    return found


def _search(haystack: IntArray, needles: IntArray) -> IntArray:
    """Where each needle stands in its sorted row."""
    return np.stack(
        [
            np.searchsorted(row, wanted)
            for row, wanted in zip(
                haystack.reshape(-1, haystack.shape[-1]), needles.reshape(-1, needles.shape[-1]), strict=True
            )
        ]
    ).reshape(needles.shape)
