"""LongRoPE with one fixed factor set, against transformers, which switches between the two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from factories import base_config, random_tokens
from transformers import AutoModelForCausalLM

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, random_gates
from trimkv_edge.models.phi3 import MINI_128K_ROPE
from trimkv_edge.models.registry import MODELS
from trimkv_edge.models.rope import choose_rope, fix_rope
from trimkv_edge.models.source import find_source

ORIGINAL, MAX = 64, 4096
SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [2.0 + 0.3 * i for i in range(8)]
THETA, HEAD = 10000.0, 16
PHI3 = find_source("phi-3-mini", random_weights=True).config


def scaled_down() -> Any:
    """Phi-3's LongRoPE: 64 times the original length, as Phi-3-mini-128k would be with 2048."""
    rope = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    more = dict(original_max_position_embeddings=ORIGINAL, max_position_embeddings=MAX)
    return base_config("phi3-mha", rope_parameters=None, rope_scaling=rope, rope_theta=THETA, **more)


def plain() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(scaled_down(), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def gated(variant: str, stream_length: int | None = None) -> GatedModel:
    base = plain()
    fix_rope(base, variant, stream_length)
    return GatedModel(base, random_gates("rg", GateShape.of(base.config), 24, 0)).eval().requires_grad_(False)


def difference(variant: str, length: int) -> float:
    """Largest difference to transformers at any token, relative to the largest logit."""
    tokens = random_tokens(length)
    with torch.no_grad():
        want = plain()(torch.tensor([tokens])).logits[0].numpy()
    # Everything fits, so nothing leaves.
    engine = EagerEngine(gated(variant), CacheConfig(budget=length, buffer=8, prefill_chunk=8))
    got = np.stack([engine.decode(token) for token in tokens])
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize(("variant", "other", "length"), [("short", "long", ORIGINAL), ("long", "short", ORIGINAL + 1)])
def test_each_set_equals_transformers_on_its_side_of_the_original_length(variant: str, other: str, length: int) -> None:
    assert difference(variant, length) < 1e-5
    assert difference(other, length) > 1e-2


@pytest.mark.parametrize(("variant", "factors"), [("short", SHORT), ("long", LONG)])
def test_frequencies_and_scaling_by_hand(variant: str, factors: list[float]) -> None:
    base = plain()
    fix_rope(base, variant)
    rotary = base.model.rotary_emb
    want = [1 / (factor * THETA ** (2 * i / HEAD)) for i, factor in enumerate(factors)]
    np.testing.assert_allclose(rotary.inv_freq.numpy(), want, rtol=1e-6)
    # sqrt(1 + ln(4096 / 64) / ln(64)): both logarithms are the same.
    assert rotary.attention_scaling == pytest.approx(math.sqrt(2))
    # No forward pass may choose again.
    with torch.no_grad():
        base(torch.tensor([random_tokens(ORIGINAL + 9)]))
    np.testing.assert_allclose(rotary.inv_freq.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("choice", "length", "variant", "limit"),
    [
        ("auto", None, "long", 2**24),
        ("auto", 1, "short", 4096),
        ("auto", 4096, "short", 4096),
        ("auto", 4097, "long", 2**24),
        ("auto", 2**24, "long", 2**24),
        ("short", None, "short", 4096),
        ("short", 4096, "short", 4096),
        ("long", 10, "long", 2**24),
    ],
)
def test_the_stream_length_chooses(choice: str, length: int | None, variant: str, limit: int) -> None:
    info = choose_rope(PHI3, choice, length)
    assert (info.variant, info.position_limit) == (variant, limit)


@pytest.mark.parametrize(
    ("choice", "length", "message"),
    [
        ("short", 4097, r"right for 4096 tokens, but the stream length is 4097: use --rope long"),
        ("auto", 0, r"stream length is 0, but must be 1 to 16777216"),
        ("auto", 2**24 + 1, r"must be 1 to 16777216"),
        ("medium", None, r"'medium' is not known; use one of auto, short, long"),
    ],
)
def test_choices_that_cannot_be_honoured(choice: str, length: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_rope(PHI3, choice, length)


def test_models_without_longrope_take_neither() -> None:
    for case in ("qwen3-gqa", "llama3-rope", "phi3-mha"):
        config = base_config(case)
        assert choose_rope(config).variant == "default"
        with pytest.raises(ConfigError, match=r"only chooses LongRoPE factors.*drop --stream-length"):
            choose_rope(config, "auto", 100)
        with pytest.raises(ConfigError, match="needs a LongRoPE model"):
            choose_rope(config, "short")


def test_the_registry_keeps_its_factors() -> None:
    # transformers completes the dictionary it is given; the registry's own stays as on the hub.
    assert set(MINI_128K_ROPE) == {"type", "short_factor", "long_factor"}
    assert MODELS["phi-3-mini"].shape["rope_scaling"] is MINI_128K_ROPE
    for name, first, last in (("short_factor", 1.1, 3.05), ("long_factor", 1.07, 64.76)):
        factors = MINI_128K_ROPE[name]
        assert len(factors) == 48  # heads of 96
        assert factors == sorted(factors)
        assert (factors[0], factors[-1]) == pytest.approx((first, last))
