"""What readers say about a stream, against transformers' own full pass and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import base_model, gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.evaluation.reader import EagerReader, EngineReader
from trimkv_edge.evaluation.samples import Answer, Sample
from trimkv_edge.models.eager import EagerEngine


def samples(length: int, count: int) -> list[Sample]:
    spans = [(5, 6), (20, 23), (length - 2, length)]
    return [Sample(tuple(random_tokens(length, seed)), tuple(Answer(a, b) for a, b in spans)) for seed in range(count)]


@pytest.mark.parametrize("case", ["qwen3-gqa", "phi3-mha", "llama-gqa"])
def test_a_budget_that_holds_all_is_the_plain_model(case: str) -> None:
    asked = samples(40, 3)
    with torch.no_grad():
        logits = base_model(case)(input_ids=torch.tensor([s.ids for s in asked])).logits.double()
    right = logits.argmax(-1)
    log_p = logits.log_softmax(-1)
    found = EagerReader(gated_model(case), CacheConfig(40, 8, 8), batch=2).score(asked)
    for row, (sample, (hit, nats)) in enumerate(zip(asked, found, strict=True)):
        for number, answer in enumerate(sample.answers):
            places = range(answer.start, answer.end)
            assert bool(hit[number]) == all(int(right[row, p - 1]) == sample.ids[p] for p in places)
            want = -sum(float(log_p[row, p - 1, sample.ids[p]]) for p in places)
            assert nats[number] == pytest.approx(want, rel=1e-4)


def test_greedy_answers_count_as_right() -> None:
    """Streams whose last tokens are the model's own greedy continuation."""
    model, config = gated_model("qwen3-gqa"), CacheConfig(12, 6, 6)
    made = []
    for seed in range(3):
        engine = EagerEngine(model, config)
        ids = random_tokens(50, seed)
        for token in ids:
            logits = engine.decode(token)
            if engine.room == 0:
                engine.evict()
        for _ in range(4):
            ids.append(int(logits.argmax()))
            logits = engine.decode(ids[-1])
            if engine.room == 0:
                engine.evict()
        made.append(Sample((*ids, 7), (Answer(10, 11), Answer(50, 54))))
    for hit, _ in EagerReader(model, config).score(made):
        assert hit[1]
    wrong = [Sample((*s.ids[:52], (s.ids[52] + 1) % 320, *s.ids[53:]), s.answers) for s in made]
    for hit, _ in EagerReader(model, config).score(wrong):
        assert not hit[1]


@pytest.mark.parametrize("policy", ["trimkv", "snapkv", "h2o"])
def test_engine_and_batch_agree(policy: str) -> None:
    model, config, asked = gated_model("qwen3-gqa"), CacheConfig(16, 8, 8, policy), samples(70, 3)
    done: list[int] = []
    together = EagerReader(model, config).score(asked, done.append)
    single = EngineReader(EagerEngine(model, config)).score(asked)
    assert sum(done) == 3 * 70
    for (hit, nats), (hit_one, nats_one) in zip(together, single, strict=True):
        assert np.array_equal(hit, hit_one)
        np.testing.assert_allclose(nats, nats_one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("span", [(0, 1), (3, 3), (9, 11)])
def test_answers_outside_the_stream(span: tuple[int, int]) -> None:
    sample = Sample(tuple(range(3, 13)), (Answer(*span),))
    with pytest.raises(ConfigError, match="stream of 10"):
        EagerReader(gated_model("qwen3-gqa"), CacheConfig(16, 8, 8)).score([sample])
