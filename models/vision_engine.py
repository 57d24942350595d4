"""The eager engine for mixed streams: text, images and video frames in one bounded cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.engine import CacheState, FloatArray, IntArray
from trimkv_edge.errors import StateError
from trimkv_edge.eviction import find_policy
from trimkv_edge.models.eager import EagerEngine, EagerPooledEngine, TorchEngine
from trimkv_edge.models.mixed_stream import Cursor, place
from trimkv_edge.models.pictures import GatedVisionModel, Picture
from trimkv_edge.pool import PooledCache


class VisionEngine(TorchEngine):
    """Reads tokens as every engine does; each placeholder among them takes the next row of the pictures shown.

    A picture may be cut between chunks at any row, so the bound holds while it is read. Its rows are freed after its
    last one.

    Attributes:
        waiting: pictures shown and not read to their end.
        cursor: where the stream stands.
    """

    def __init__(self, model: GatedVisionModel, config: CacheConfig, position_limit: int = POSITION_LIMIT) -> None:
        super().__init__(model, config, position_limit)
        self._vision = model
        self.waiting: list[Picture] = []
        self.cursor = Cursor()

    def show(self, pictures: Sequence[Picture]) -> None:
        """Queues pictures, in the order of their placeholders.

        Raises:
            StateError: rows of another model.
        """
        want = (len(self._vision.base.config.vision_config.deepstack_visual_indexes), self._vision.config.hidden_size)
        for picture in pictures:
            found = (picture.deepstack.shape[0], picture.embeddings.shape[1])
            if found != want:
                raise StateError(
                    f"a picture with {found[0]} DeepStack features of width {found[1]}, but this model has {want[0]} "
                    f"of width {want[1]}: encode it with this model"
                )
        self.waiting.extend(pictures)

    @torch.no_grad()
    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        placed = place(ids, self.cursor, self.waiting, self._vision.placeholders)
        logits = self._vision.read(torch.from_numpy(ids)[None], placed.rows, self.cache)
        self.cache.advance(ids.size)
        self.cursor = placed.cursor
        del self.waiting[: placed.finished]
        return np.asarray(logits[0, -1].float().numpy())

    def _reset(self) -> None:
        super()._reset()
        self.waiting.clear()
        self.cursor = Cursor()

    def load_state(self, state: CacheState) -> None:
        """Refused: a saved state does not hold the M-RoPE position of a mixed stream."""
        raise StateError("a saved state does not say where a stream with pictures stands: read the stream again")


class EagerVisionEngine(VisionEngine, EagerEngine):
    """Policies with a budget for each head."""

    cache: StaticCache


class EagerPooledVisionEngine(VisionEngine, EagerPooledEngine):
    """Policies with a shared budget."""

    cache: PooledCache


def vision_engine(
    model: GatedVisionModel, config: CacheConfig, position_limit: int = POSITION_LIMIT
) -> EagerVisionEngine | EagerPooledVisionEngine:
    """The engine of the kind that the policy needs.

    Raises:
        ConfigError: settings that the policy cannot honour.
    """
    kind = EagerPooledVisionEngine if find_policy(config.policy).pooled else EagerVisionEngine
    return kind(model, config, position_limit)
