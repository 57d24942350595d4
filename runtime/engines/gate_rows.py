"""Rows that the gates have yet to read."""

from __future__ import annotations

import numpy as np

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray


class GateRows:
    """What the gates of all layers read, of the newest tokens, until they have read it.

    Log-betas are needed by events and saved states alone. Asked after every token, gates would read their weights from
    memory for each one, a tenth of what a step of a small model reads; rows that are read together share that.

    Args:
        layers, hidden_size: shape of the model.
        config: cache settings.

    Attributes:
        rows: float32 ``[layers, capacity, hidden_size]``.
        waiting: how many of them count; they belong to the newest entries, whose log-betas are not in the cache.
    """

    def __init__(self, layers: int, hidden_size: int, config: CacheConfig) -> None:
        self.rows: FloatArray = np.zeros((layers, config.gate_rows, hidden_size), np.float32)
        self.waiting = 0

    def due(self, count: int) -> bool:
        """Whether those that wait must be read before a chunk of ``count`` tokens: longer ones need the first rows."""
        return self.waiting > 0 and (count > 1 or self.waiting == self.rows.shape[1])
