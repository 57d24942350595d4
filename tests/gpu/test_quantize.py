"""Rounded weights: what int8 is, number by number, and how far ``tiny`` agrees with itself in float32."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.verify import ParityReport, compare, load_tolerance, stream_plan
from trimkv_edge.gpu.engine import CompiledEngine
from trimkv_edge.gpu.placement import moved
from trimkv_edge.gpu.quantize import quantize
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.data import random_text

CONFIG = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
TINY = CacheConfig(budget=128, buffer=64, prefill_chunk=64)


def test_int8_is_a_scale_for_each_output_channel() -> None:
    """255 steps over twice the channel's largest weight: whole steps, and no weight off by more than half of one."""
    model, eager = gated_model("qwen3-gqa"), gated_model("qwen3-gqa")
    rounded = quantize(moved(model, "cpu"), "int8")
    layers = 0
    for name, part in eager.named_modules():
        if isinstance(part, torch.nn.Linear) and "retention_gate" not in name:
            step = part.weight.abs().amax(1, keepdim=True) / 127.5
            stored = rounded.get_submodule(name).weight.dequantize()
            steps = stored / step
            assert (steps - steps.round()).abs().max() < 1e-3
            assert (stored - part.weight).abs().div(step).max() < 0.501
            assert (stored - part.weight).abs().div(step).mean() > 0.2
            part.weight.data = stored
            layers += 1
    assert layers == 2 * 7 + 1
    engine, want = CompiledEngine(rounded, CONFIG, compiled=False), EagerEngine(eager, CONFIG)
    for start in range(0, 64, 8):
        for each in (engine, want):
            if each.room == 0:
                each.evict()
        got, expected = (each.prefill(random_tokens(8, seed=start)) for each in (engine, want))
        np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_array_equal(engine.survivors(), want.survivors())


def test_gates_and_the_embedding_stay_as_they_are() -> None:
    model = gated_model("qwen3-gqa")
    rounded = quantize(moved(model, "cpu"), "int8")
    changed = {name for name, part in rounded.named_parameters() if type(part.data) is not torch.Tensor}
    linear = {f"{n}.weight" for n, part in model.base.named_modules() if isinstance(part, torch.nn.Linear)}
    assert changed == {f"base.{name}" for name in linear if "retention_gate" not in name}
    assert "base.lm_head.weight" in changed
    assert {type(part.data) for part in model.parameters()} == {torch.Tensor}


@cache
def tiny() -> tuple[GatedModel, list[int]]:
    """The model, and text that it was not trained on and that no change of this project changes."""
    plan = stream_plan(TINY.budget, TINY.buffer, TINY.prefill_chunk, singles=64)
    return load_model(find_source("tiny")).model, random_text(random.Random(0), sum(plan), held_out=True)


def agreement(dtype: torch.dtype, scheme: str) -> ParityReport:
    """Over 5 events; single steps are text too, and after each event both go on from the same entries."""
    model, tokens = tiny()
    plan = stream_plan(TINY.budget, TINY.buffer, TINY.prefill_chunk, singles=64)
    engine = CompiledEngine(quantize(moved(model, "cpu", dtype), scheme), TINY, compiled=False)
    rel = load_tolerance("float32").score_rel
    return compare(EagerEngine(model, TINY), engine, tokens, plan, rel, scripted=True)


@pytest.mark.parametrize(
    ("dtype", "scheme", "survivors", "greedy"),
    [
        (torch.float32, "none", 1.0, 1.0),
        (torch.bfloat16, "none", 0.99, 0.97),
        (torch.float32, "int8", 0.99, 0.97),
        (torch.bfloat16, "int8", 0.99, 0.97),
        (torch.float32, "int4", 0.97, 0.8),
    ],
    ids=str,
)
def test_tiny_agrees_with_itself_in_float32(dtype: torch.dtype, scheme: str, survivors: float, greedy: float) -> None:
    report = agreement(dtype, scheme)
    kept = 1 - (report.survivor_mismatches + report.undecidable) / report.survivors
    same = 1 - report.greedy_mismatches / report.steps
    print(
        f"{dtype} {scheme}: survivors {kept:.4f} of {report.survivors}, greedy {same:.4f} of {report.steps}, "
        f"logits {report.max_logit_diff:.3g} of {report.max_logit:.3g}"
    )
    assert report.events >= 5
    assert kept >= survivors
    assert same >= greedy


def test_int8_runs_compiled() -> None:
    model, tokens = gated_model("llama-gqa"), random_tokens(60)
    engine = CompiledEngine(quantize(moved(model, "cpu"), "int8"), CacheConfig(16, 8, 1))
    step = CompiledEngine(quantize(moved(model, "cpu"), "int8"), CacheConfig(16, 8, 1), compiled=False)
    for token in tokens:
        if engine.room == 0:
            engine.evict()
            step.evict()
        np.testing.assert_allclose(engine.decode(token), step.decode(token), atol=1e-4)
    np.testing.assert_array_equal(engine.survivors(), step.survivors())


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not round weights to '8da4w': use one of none, int8, int4"):
        quantize(gated_model("llama-gqa"), "8da4w")
    odd = gated_model("llama-gqa")
    odd.base.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 64, bias=False)
    with pytest.raises(ConfigError, match="groups of 32, but a layer is 40 wide"):
        quantize(odd, "int4")
