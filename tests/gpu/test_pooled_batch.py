"""Each stream of a batch whose heads share a budget is what the same stream is alone, in a pool of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from factories import gated_model, random_tokens
from lone_stream import Alone, compare, one_is_driven_by_itself, one_waits_and_one_begins_anew
from torch._dynamo.utils import counters

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.gpu.batch import Batch

CONFIG = CacheConfig(budget=17, buffer=6, prefill_chunk=5, policy="global")
LENGTHS = (9, 61, 23)
SETTINGS = [
    CacheConfig(17, 6, 5, policy="layer"),
    CacheConfig(17, 6, 5, policy="global", caps=((20, 30), (17, 23)), sinks=2),
    CacheConfig(5, 9, 1, policy="global"),
]


def alone_like(config: CacheConfig = CONFIG) -> Alone:
    return Alone(gated_model("qwen3-gqa", "rg10"), config)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Batch]:
    torch._dynamo.reset()
    counters.clear()
    batch = Batch(gated_model("qwen3-gqa", "rg10"), CONFIG, 3)
    batch.graphs.warm_up()
    yield batch
    torch._dynamo.reset()


@pytest.fixture
def batch(compiled: Batch) -> Batch:
    for stream in compiled.streams:
        stream.reset()
    return compiled


def same_course(batch: Batch, alone: list[Alone], rounds: tuple[int, ...]) -> None:
    prompts = {row: random_tokens(length, seed=row) for row, length in enumerate(LENGTHS)}
    batch.read(prompts)
    for row, tokens in prompts.items():
        alone[row].read(tokens)
    compare(batch, alone)
    for steps in rounds:
        np.testing.assert_array_equal(batch.decode(steps).tokens(), [stream.decode(steps) for stream in alone])
        compare(batch, alone)


def test_compiled_streams_of_different_lengths_are_what_they_are_alone(batch: Batch) -> None:
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2
    alone = [alone_like() for _ in LENGTHS]
    same_course(batch, alone, (1, 40, 13))
    assert len({stream.engine.live for stream in alone}) == 3  # so events fall on different steps
    kept = np.stack([stream.kept for stream in batch.streams])
    assert len({tuple(row.flatten()) for row in kept}) == 3  # and heads have other lengths in each
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_settings_follow_each_stream(config: CacheConfig) -> None:
    batch = Batch(gated_model("qwen3-gqa", "rg10"), config, len(LENGTHS), compiled=False)
    for stream in batch.streams:
        for table in (stream.pool.key, stream.pool.value, stream.pool.log_beta):
            table.fill_(float("nan"))  # what no stream has written must not matter
    same_course(batch, [alone_like(config) for _ in LENGTHS], (30,))


def test_a_stream_waits_or_begins_anew_while_others_go_on(batch: Batch) -> None:
    one_waits_and_one_begins_anew(batch, alone_like)


def test_a_stream_can_be_given_a_state_and_driven_by_itself(batch: Batch) -> None:
    one_is_driven_by_itself(batch, alone_like)


def test_a_step_that_failed_is_repeated_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(gated_model("qwen3-gqa", "rg10"), CONFIG, len(LENGTHS), compiled=False)
    alone = [alone_like() for _ in LENGTHS]
    same_course(batch, alone, (8,))

    def fails() -> None:
        run()
        raise RuntimeError("out of memory")

    run = batch.graphs.decode
    monkeypatch.setattr(batch.graphs, "decode", fails)
    before = batch.graphs.logits.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        batch.decode(1)
    monkeypatch.undo()
    batch.graphs.logits.copy_(before)
    np.testing.assert_array_equal(batch.decode(15).tokens(), [stream.decode(15) for stream in alone])
    compare(batch, alone)


def test_what_cannot_be_done_is_refused() -> None:
    model = gated_model("qwen3-gqa", "rg10")
    with pytest.raises(ConfigError, match="batch is 0, but must be at least 1"):
        Batch(model, CONFIG, 0, compiled=False)
    with pytest.raises(ConfigError, match="the caps are for 1 layers"):
        Batch(model, CacheConfig(17, 6, 5, policy="global", caps=((20, 30),)), 2, compiled=False)
    batch = Batch(model, CONFIG, 2, compiled=False)
    with pytest.raises(StateError, match="eviction runs when the ring is full"):
        batch.streams[1].evict()
