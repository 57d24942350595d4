"""One stream in the eager engine, which a stream of a batch equals, and courses that all kinds of batches take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from factories import random_tokens

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


def one_waits_and_one_begins_anew(batch: Batch, alone_like: Callable[[], Alone]) -> None:
    """Of three empty streams one waits with a full ring while the others go on, and one is reset."""
    full = batch.config.slots
    alone = [alone_like() for _ in batch.streams]
    batch.read({0: random_tokens(40)})
    batch.read({2: random_tokens(full)})
    alone[0].read(random_tokens(40))
    alone[2].read(random_tokens(full))
    assert (batch.streams[1].seen, batch.streams[2].room) == (0, 0)
    np.testing.assert_array_equal(batch.decode(30, rows=[0]).tokens()[0], alone[0].decode(30))
    batch.read({1: random_tokens(33, seed=4)})
    alone[1].read(random_tokens(33, seed=4))
    np.testing.assert_array_equal(batch.decode(9, rows=[1, 2]).tokens()[1:], [row.decode(9) for row in alone[1:]])
    compare(batch, alone)
    batch.streams[0].reset()
    alone[0] = alone_like()
    batch.read({0: random_tokens(5, seed=8)})
    alone[0].read(random_tokens(5, seed=8))
    np.testing.assert_array_equal(batch.decode(11).tokens(), [row.decode(11) for row in alone])


def one_is_driven_by_itself(batch: Batch, alone_like: Callable[[], Alone]) -> None:
    """Of three empty streams one is given a state and decodes by itself, while one is full and one waits."""
    reference, other = alone_like(), alone_like()
    reference.read(random_tokens(50))
    batch.read({1: random_tokens(30, seed=2)})
    batch.read({0: random_tokens(batch.config.slots, seed=1)})
    assert batch.streams[0].room == 0
    other.read(random_tokens(30, seed=2))
    stream = batch.streams[2]
    stream.load_state(reference.engine.state())
    for token in random_tokens(30, seed=3):
        if stream.room == 0:
            stream.evict()
        reference.read([token])
        np.testing.assert_allclose(stream.decode(token), reference.logits, atol=1e-4)
    np.testing.assert_array_equal(stream.survivors(), reference.engine.survivors())
    np.testing.assert_array_equal(batch.decode(20, rows=[1]).tokens()[1], other.decode(20))
