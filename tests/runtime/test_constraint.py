"""Constraints against the grammar's own words: what random choices make parses and fits."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from text_artefact import text_artefact

from trimkv_edge.errors import ConfigError, StateError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.constraint import Grammars
from trimkv_edge.runtime.sampling import Sampler, SamplingParams
from trimkv_edge.runtime.session import Session


@pytest.fixture(scope="module")
def artefact() -> Artefact:
    return Artefact.load(text_artefact())


def test_every_choice_that_is_allowed_leads_to_json(artefact: Artefact) -> None:
    grammars, tokenizer = Grammars(artefact), artefact.tokenizer
    assert tokenizer is not None
    schema = {"type": "array", "items": {"enum": [1, 22, "a", None]}, "minItems": 1, "maxItems": 3}
    seen = set()
    for seed in range(40):
        constraint, rng, tokens = grammars.of_schema(schema), random.Random(seed), list[int]()
        while True:
            allowed = np.flatnonzero(constraint.allowed())
            assert allowed.size
            token = int(rng.choice(list(allowed)))
            constraint.accept(token)
            if token == 2:  # the tokenizer's end
                break
            tokens.append(token)
        made = json.loads(tokenizer.decode(tokens))
        assert 1 <= len(made) <= 3
        assert all(item in (1, 22, "a", None) for item in made)
        seen.add(len(made))
    assert seen == {1, 2, 3}


def test_what_is_not_allowed_is_refused(artefact: Artefact) -> None:
    constraint = Grammars(artefact).of_schema({"const": "x"})
    wrong = int(np.flatnonzero(~constraint.allowed())[0])
    with pytest.raises(ConfigError, match="cannot follow its JSON schema"):
        constraint.accept(wrong)


def test_a_session_draws_from_what_is_allowed(artefact: Artefact) -> None:
    session = Session.open(artefact, "onnx", 1)
    session.feed([5, 6, 7])
    constraint = Grammars(artefact).of_schema({"const": "abc"})
    pieces = list(session.generate(50, SamplingParams(temperature=2.0, seed=1), [2], constraint=constraint))
    assert "".join(piece.text for piece in pieces) == '"abc"'
    assert pieces[-1].token == 2


def test_the_sampler_takes_the_best_of_what_is_allowed() -> None:
    logits = np.array([3.0, 9.0, 4.0, 4.0], np.float32)
    assert Sampler(SamplingParams()).sample(logits, allowed=np.array([True, False, True, True])) == 2
    with pytest.raises(StateError, match="no token is allowed"):
        Sampler(SamplingParams()).sample(logits, allowed=np.zeros(4, np.bool_))
