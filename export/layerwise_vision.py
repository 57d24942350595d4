"""The layer-by-layer reference for models that read pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Cursor, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.export.layerwise import LayerwiseReference
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.mixed_stream import place
from trimkv_edge.models.family import text_decoder, vision_encoder
from trimkv_edge.models.mixed_sample import MixedSample
from trimkv_edge.models.picture_encoder import PictureEncoder
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.pictures import ChunkRows, Picture


class LayerwiseVisionReference(MixedEngine, LayerwiseReference):
    """Plays back a stream with pictures. The encoder is in memory while it runs over them, before the first layer.

    Args:
        weights: of a :class:`GatedVisionModel`.
        sample: the stream; the others are as for :class:`LayerwiseReference`.
    """

    def __init__(
        self,
        weights: ReferenceWeights,
        config: CacheConfig,
        sample: MixedSample,
        plan: Sequence[int],
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
        scales: KVScales | None = None,
    ) -> None:
        model = weights.model
        assert isinstance(model, GatedVisionModel)
        self._placeholders = model.placeholders
        self._sample, self._pictures = sample, _encode(weights, sample)
        placed = place(np.array(sample.tokens[: sum(plan)]), Cursor(), self._pictures, self._placeholders)
        self._rows = placed.rows
        super().__init__(weights, config, sample.tokens, plan, folder, progress, scales)

    @property
    def placeholders(self) -> Mapping[int, str]:
        return self._placeholders

    @property
    def picture_shape(self) -> tuple[int, int]:
        first = self._pictures[0]
        return first.deepstack.shape[0], first.embeddings.shape[1]

    def encode(self, kind: str, pixel_values: FloatArray, grid_thw: IntArray) -> list[Picture]:
        """Of the pictures of its own stream only."""
        for (_, pixels, _), picture in zip(self._sample.pictures, self._pictures, strict=True):
            if pixels is pixel_values:
                return [picture]
        raise StateError("this reference plays back one stream: it encodes its pictures only")

    def _inputs(self, weights: ReferenceWeights, stream: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        decoder = text_decoder(weights.model.base)
        hidden = weights.fill(decoder.embed_tokens)(stream)
        rows = torch.from_numpy(self._rows.embeddings)
        if len(rows):
            hidden[0, torch.from_numpy(self._rows.visual)] = rows
        return hidden, decoder.rotary_emb(hidden, torch.from_numpy(self._rows.positions)[:, None])

    def _behind(self, index: int, hidden: Tensor) -> Tensor:
        features = self._rows.deepstack
        if index < len(features) and features[index].size:
            hidden[0, torch.from_numpy(self._rows.visual)] += torch.from_numpy(features[index])
        return hidden

    def _forward_rows(self, ids: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        return LayerwiseReference._forward(self, ids, self.seen, live)


@torch.no_grad()
def _encode(weights: ReferenceWeights, sample: MixedSample) -> list[Picture]:
    encoder = vision_encoder(weights.model.base)
    assert encoder is not None
    visual, found = weights.fill(encoder), []
    for kind, pixels, grid in sample.pictures:
        down, across = grid[0, 1:].tolist()
        rows, features = PictureEncoder(visual, down, across)(torch.from_numpy(pixels))
        merge = visual.config.spatial_merge_size
        found.append(Picture(kind, down // merge, across // merge, rows.numpy(), features.numpy()))
    return found
