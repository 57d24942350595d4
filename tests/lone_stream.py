"""One stream in the eager engine, which a stream of a batch has to equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimkv_edge.config import CacheConfig
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.gated import GatedModel


class Alone:
    """Reads, and continues with the best token."""

    def __init__(self, model: GatedModel, config: CacheConfig) -> None:
        self.engine, self.logits = eager_engine(model, config), np.zeros(0, np.float32)

    def settle(self) -> None:
        """Runs the event that is due, if one is."""
        if self.engine.room == 0:
            self.engine.evict()

    def read(self, tokens: list[int]) -> None:
        for token in tokens:
            self.settle()
            self.logits = self.engine.decode(token)

    def decode(self, steps: int) -> list[int]:
        drawn = []
        for _ in range(steps):
            drawn.append(int(self.logits.argmax()))
            self.read(drawn[-1:])
        return drawn


def compare(batch: Batch, alone: Sequence[Alone]) -> None:
    """After the events that are due: a batch may run one earlier than the stream would have to."""
    batch.evict()
    for row, (stream, other) in enumerate(zip(batch.streams, alone, strict=True)):
        other.settle()
        assert (stream.seen, stream.live) == (other.engine.seen, other.engine.live)
        np.testing.assert_array_equal(stream.survivors(), other.engine.survivors())
        got, want = stream.state(), other.engine.state()
        np.testing.assert_array_equal(got.lengths, want.lengths)
        for name in ("key", "value", "log_beta"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=5e-5, err_msg=f"{name} of {row}")
        if other.engine.seen:
            np.testing.assert_allclose(batch.graphs.logits[row].numpy(), other.logits, atol=1e-4)
