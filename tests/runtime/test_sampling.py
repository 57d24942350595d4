"""Sampling against hand tables and an independent implementation that sorts and loops."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.runtime.sampling import Sampler, SamplerState, SamplingParams, filter_logits, penalise

# Probabilities 0.5, 0.25, 0.125, 0.125 in this order of ids.
HALVES = np.log([0.125, 0.5, 0.125, 0.25])


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities by the book: one token at a time, from the most likely down."""
    scores = {token: logit / params.temperature for token, logit in enumerate(logits)}

    def probabilities() -> dict[int, float]:
        top = max(scores.values())
        weights = {token: math.exp(score - top) for token, score in scores.items()}
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}

    if params.top_k:
        border = sorted(scores.values(), reverse=True)[: params.top_k][-1]
        scores = {token: score for token, score in scores.items() if score >= border}
    if params.top_p < 1:
        reached, kept = 0.0, {}
        for token, share in sorted(probabilities().items(), key=lambda item: (-scores[item[0]], item[0])):
            if reached >= params.top_p:
                break
            kept[token] = scores[token]
            reached += share
        scores = kept
    if params.min_p:
        shares = probabilities()
        scores = {token: scores[token] for token in scores if shares[token] >= params.min_p * max(shares.values())}
    shares = probabilities()
    return [shares.get(token, 0.0) for token in range(len(logits))]


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 7), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.001, 0.37, 0.71, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.29, 1.0]),
)
def test_filters_agree_with_brute_force(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p)
    found = filter_logits(np.array(logits), params)
    np.testing.assert_allclose(found, brute_force(logits, params), rtol=1e-12, atol=0)


@given(seed=st.integers(0, 2**32), top_k=st.integers(1, 60), top_p=st.floats(0.05, 0.99), min_p=st.floats(0.001, 0.5))
@settings(max_examples=50, deadline=None)
def test_filters_agree_with_transformers(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    random = np.random.default_rng(seed)
    logits, prompt = random.normal(size=50) * 3, random.integers(0, 50, 8)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(min(top_k, 50)),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    want = chain(torch.from_numpy(prompt)[None], torch.from_numpy(logits)[None])[0].softmax(-1).numpy()
    params = SamplingParams(0.7, top_k, top_p, min_p, repetition_penalty=1.3)
    seen = np.isin(np.arange(50), prompt)
    np.testing.assert_allclose(filter_logits(penalise(logits, seen, 1.3), params), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, [0.125, 0.5, 0.125, 0.25]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3}, [0.125, 0.5, 0.125, 0.25]),  # two tokens tie for the third place
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of the tie, the lower id
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"top_k": 2, "min_p": 0.6}, [0, 1, 0, 0]),
        # Temperature comes before top-p: at 0.5 the best token alone reaches 0.7.
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
    ],
)
def test_filters_by_hand(settings_: dict[str, Any], expected: list[float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings_})
    np.testing.assert_allclose(filter_logits(HALVES, params), expected, rtol=1e-12)


def test_greedy_takes_the_lowest_id_of_equal_ones() -> None:
    assert Sampler(SamplingParams()).sample([1.0, 3.0, 3.0, 2.0]) == 1


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.sample([3.0, 2.0], np.array([True, False])) == 1  # 1.5 < 2
    assert sampler.sample([-1.0, -1.5], np.array([True, False])) == 1  # -2 < -1.5
    assert sampler.sample([3.0, 1.0], np.array([True, False])) == 0  # 1.5 > 1


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.8, seed=3))
    counts = Counter(sampler.sample(HALVES) for _ in range(7000))
    assert set(counts) == {0, 1, 3}
    for token, share in ((0, 1 / 7), (1, 4 / 7), (3, 2 / 7)):
        deviation = math.sqrt(7000 * share * (1 - share))
        assert abs(counts[token] - 7000 * share) < 5 * deviation


@given(seed=st.integers(0, 2**63), count=st.integers(1, 30))
@settings(max_examples=20)
def test_a_seed_repeats_and_another_differs(seed: int, count: int) -> None:
    def draw(number: int, length: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=number))
        return [sampler.sample(np.zeros(1000)) for _ in range(length)]

    assert draw(seed, count) == draw(seed, count)
    assert draw(seed, 30) != draw(seed + 1, 30)


def test_masked_tokens_are_never_drawn() -> None:
    sampler = Sampler(SamplingParams(temperature=5.0, seed=0))
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    assert {sampler.sample(logits) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [[0.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_broken_logits_are_an_error(bad: list[float]) -> None:
    with pytest.raises(StateError, match="highest logit"):
        Sampler(SamplingParams(temperature=1.0)).sample(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_name_the_setting_and_the_value(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field.replace('_', '.')} is {value}"):
        SamplingParams(**{field: value})


def test_a_resumed_sampler_draws_on() -> None:
    params = SamplingParams(temperature=1.0, top_k=900, seed=11)
    whole, first = Sampler(params), Sampler(params)
    draws = [whole.sample(np.zeros(1000)) for _ in range(12)]
    assert [first.sample(np.zeros(1000)) for _ in range(5)] == draws[:5]
    second = Sampler.resume(first.state)
    assert second.params == params
    assert [second.sample(np.zeros(1000)) for _ in range(7)] == draws[5:]
    # A seed goes on meaning what it did: numpy's own generator, one uniform number for each draw.
    uniform = np.random.default_rng(11).random(12)
    assert draws == [int(number * 1000) for number in uniform]


@pytest.mark.parametrize(("state", "increment"), [(-1, 1), (2**128, 1), (0, 2), (0, 2**128 + 1)])
def test_a_state_that_no_generator_has_is_refused(state: int, increment: int) -> None:
    with pytest.raises(ConfigError, match="none of PCG64"):
        SamplerState(SamplingParams(), state, increment)
