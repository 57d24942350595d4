"""The eager engine for mixed streams: text, images and video frames in one bounded cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.eviction import find_policy
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.eager import EagerEngine, EagerPooledEngine, TorchEngine
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.pictures import VIDEO, ChunkRows, Picture
from trimkv_edge.pool import PooledCache


class VisionEngine(MixedEngine, TorchEngine):
    """Runs a :class:`GatedVisionModel` in torch; arguments as for its second base."""

    model: GatedVisionModel

    @property
    def placeholders(self) -> Mapping[int, str]:
        return self.model.placeholders

    @property
    def picture_shape(self) -> tuple[int, int]:
        return self.model.features, self.model.config.hidden_size

    def encode(self, kind: str, pixel_values: FloatArray, grid_thw: IntArray) -> list[Picture]:
        """See :class:`MixedEngine`."""
        encode = self.model.videos if kind == VIDEO else self.model.images
        return encode(torch.from_numpy(pixel_values), torch.from_numpy(grid_thw))

    @torch.no_grad()
    def _forward_rows(self, ids: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        logits = self.model.read(torch.from_numpy(ids)[None], rows, self.cache)
        self.cache.advance(ids.size)
        return np.asarray(logits[0, -1].float().numpy())


class EagerVisionEngine(VisionEngine, EagerEngine):
    """Policies with a budget for each head."""

    cache: StaticCache


class EagerPooledVisionEngine(VisionEngine, EagerPooledEngine):
    """Policies with a shared budget."""

    cache: PooledCache


def vision_engine(
    model: GatedVisionModel,
    config: CacheConfig,
    position_limit: int = POSITION_LIMIT,
    scales: KVScales | None = None,
) -> EagerVisionEngine | EagerPooledVisionEngine:
    """The engine of the kind that the policy needs; ``scales`` for int8 keys and values.

    Raises:
        ConfigError: settings that the policy cannot honour.
    """
    kind = EagerPooledVisionEngine if find_policy(config.policy).pooled else EagerVisionEngine
    return kind(model, config, position_limit, scales)
