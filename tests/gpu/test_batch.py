"""Each stream of a batch is what the same stream is alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from factories import gated_model, random_tokens
from lone_stream import Alone, compare, one_is_driven_by_itself, one_waits_and_one_begins_anew
from torch._dynamo.utils import counters

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, PositionLimitError, StateError
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.runtime.sampling import SamplingParams

CONFIG = CacheConfig(budget=15, buffer=7, prefill_chunk=6, sinks=1)
LENGTHS = (9, 61, 22)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Batch]:
    torch._dynamo.reset()
    counters.clear()
    batch = Batch(gated_model("llama-gqa"), CONFIG, 3)
    batch.graphs.warm_up()
    yield batch
    torch._dynamo.reset()


@pytest.fixture
def batch(compiled: Batch) -> Batch:
    for stream in compiled.streams:
        stream.reset()
    return compiled


def alone_like(config: CacheConfig = CONFIG) -> Alone:
    return Alone(gated_model("llama-gqa"), config)


def test_streams_of_different_lengths_are_what_they_are_alone(batch: Batch) -> None:
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3
    alone = [alone_like() for _ in LENGTHS]
    prompts = {row: random_tokens(length, seed=row) for row, length in enumerate(LENGTHS)}
    batch.read(prompts)
    for row, tokens in prompts.items():
        alone[row].read(tokens)
    compare(batch, alone)
    for steps in (1, 40, 13):
        drawn = batch.decode(steps).tokens()
        np.testing.assert_array_equal(drawn, [stream.decode(steps) for stream in alone])
        compare(batch, alone)
    events = [(stream.engine.seen - 15) // 7 for stream in alone]
    assert min(events) >= 5
    assert len({stream.engine.seen % 7 for stream in alone}) == 3  # so events fall on different steps
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_stream_waits_or_begins_anew_while_others_go_on(batch: Batch) -> None:
    one_waits_and_one_begins_anew(batch, alone_like)


def test_a_stream_can_be_given_a_state_and_driven_by_itself(batch: Batch) -> None:
    one_is_driven_by_itself(batch, alone_like)


def test_a_policy_without_a_kernel_follows_each_stream() -> None:
    config = CacheConfig(15, 7, 6, policy="random")
    batch = Batch(gated_model("llama-gqa"), config, 2, compiled=False)
    alone = [alone_like(config), alone_like(config)]
    batch.read({0: random_tokens(31), 1: random_tokens(44)})
    alone[0].read(random_tokens(31))
    alone[1].read(random_tokens(44))
    np.testing.assert_array_equal(batch.decode(30).tokens(), [row.decode(30) for row in alone])
    compare(batch, alone)


def test_drawn_tokens_follow_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probabilities.log().repeat(20000, 1)

    def share(**settings: float) -> list[float]:
        drawn = DeviceSampler(SamplingParams(seed=5, **settings))(logits)
        return [(drawn == token).float().mean().item() for token in range(4)]

    assert share(temperature=0.0) == [1, 0, 0, 0]
    np.testing.assert_allclose(share(temperature=1.0), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    np.testing.assert_allclose(share(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(share(temperature=1.0, min_p=0.25), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.015)
    squares = np.array([0.25, 0.0625, 0.0225, 0.01])
    np.testing.assert_allclose(share(temperature=0.5), squares / squares.sum(), atol=0.015)


def test_a_seed_draws_the_same_again() -> None:
    drawn = []
    for seed in (3, 3, 4):
        batch = Batch(gated_model("llama-gqa"), CONFIG, 2, compiled=False)
        batch.read({0: [5, 6], 1: [7]})
        sampler = DeviceSampler(SamplingParams(temperature=1.5, seed=seed))
        drawn.append(np.concatenate([batch.decode(8, sampler).tokens() for _ in range(2)], 1))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_what_cannot_be_done_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="batch is 0"):
        Batch(gated_model("llama-gqa"), CONFIG, 0, compiled=False)
    with pytest.raises(ConfigError, match="not drawn on the device"):
        DeviceSampler(SamplingParams(temperature=1.0, top_p=0.9))
    batch = Batch(gated_model("llama-gqa"), CONFIG, 2, position_limit=40, compiled=False)
    with pytest.raises(StateError, match="no stream has read anything"):
        batch.decode(1)
    with pytest.raises(StateError, match="stream 2 is not one of 0 to 1"):
        batch.read({0: [5], 2: [5]})
    with pytest.raises(StateError, match="stream 1 has no tokens"):
        batch.read({0: [5], 1: []})
    with pytest.raises(StateError, match="outside the vocabulary of 320"):
        batch.read({0: [5], 1: [320]})
    with pytest.raises(PositionLimitError, match=r"stream 1 would pass the last position .*\(39\)"):
        batch.read({0: [5], 1: [5] * 41})
    assert [stream.seen for stream in batch.streams] == [0, 0]
    batch.read({0: [5] * 30})
    with pytest.raises(StateError, match="stream 1 has read nothing"):
        batch.decode(1, rows=[0, 1])
    with pytest.raises(StateError, match="0 steps"):
        batch.decode(0)
    with pytest.raises(PositionLimitError):
        batch.decode(11)
    assert batch.decode(10).tokens().shape == (2, 10)
