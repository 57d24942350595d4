"""Whole gated passes: gradients with and without gradient checkpointing, and the vanilla pass."""

from __future__ import annotations

import pytest
import torch
from factories import base_model, gated_model
from torch.utils.checkpoint import checkpoint

from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.training.backends import DecayedAttention, FullAttention

IDS = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(0))
PLACES = torch.arange(20).repeat(2, 1)


def gradients(model: GatedModel, checkpointed: bool) -> list[torch.Tensor]:
    model.base.requires_grad_(False)
    for gate in model.gates:
        gate.requires_grad_(True)
        gate.zero_grad()
    backend = DecayedAttention(PLACES)
    layers = model.base.model.layers
    originals = [layer.forward for layer in layers]
    if checkpointed:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)
    try:
        hidden = model.base.model(input_ids=IDS, position_ids=PLACES, use_cache=False, **{BACKEND_KEYWORD: backend})
        held = sum(log_beta.sum() for log_beta in backend.log_beta.values())
        (hidden.last_hidden_state.square().mean() + 0.01 * held).backward()
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = forward
    return [parameter.grad.clone() for gate in model.gates for parameter in gate.parameters()]


@pytest.mark.parametrize("case", ["qwen3-gqa", "phi3-mha", "llama-gqa"])
def test_gradient_checkpointing_changes_no_gradient(case: str) -> None:
    model = gated_model(case)
    plain, again = gradients(model, False), gradients(model, True)
    assert any(grad.abs().sum() > 0 for grad in plain)
    for left, right in zip(plain, again, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("case", ["qwen3-gqa", "phi3-mha", "llama-gqa"])
def test_the_full_pass_is_the_plain_model(case: str) -> None:
    with torch.no_grad():
        want = base_model(case)(input_ids=IDS).logits
        got = gated_model(case)(IDS, PLACES, FullAttention(), last_only=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
