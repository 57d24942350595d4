"""Our policies keep what kvpress, an independent implementation, kept of the same tokens (docs/baselines.md).

kvpress itself is not needed: what it kept is in ``data/kvpress``, recorded by ``benchmarks/kvpress/record.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trimkv_edge.models.gated import GatedModel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kvpress" / "recording.py"
DATA = Path(__file__).parent / "data" / "kvpress"


def load_script() -> Any:
    """Benchmarks are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("kvpress_recording", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recording = load_script()


@pytest.fixture(scope="module")
def recorded() -> Any:
    return recording.Recording.load(DATA)


@pytest.fixture(scope="module")
def model(recorded: Any) -> GatedModel:
    return recorded.model()


def test_the_recording_is_of_kvpress_and_can_tell_policies_apart(recorded: Any) -> None:
    assert recorded.about["versions"]["kvpress"] == "0.5.5"
    kept = {press: recorded.tensors[f"{press}/prompt"] for press in recording.PAIRS.values()}
    assert all(rows.shape == (2, 2, 32) for rows in kept.values())
    for press, rows in kept.items():
        assert all(recording.same_heads(rows, other) == 0 for name, other in kept.items() if name != press)


def test_keys_of_both_transformers_are_equal(recorded: Any, model: GatedModel) -> None:
    torch.testing.assert_close(recorded.keys(model), recorded.tensors["keys"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["streaming", "keydiff", "snapkv", "tova"])
def test_a_prompt_keeps_the_same_entries(recorded: Any, model: GatedModel, policy: str) -> None:
    event = recorded.prompt(model, policy)
    assert torch.equal(event.kept, recorded.tensors[f"{policy}/prompt"].long())


@pytest.mark.parametrize(("policy", "always_kept"), [("keydiff", 0), ("snapkv", 16), ("tova", 1)])
def test_scores_are_theirs(recorded: Any, model: GatedModel, policy: str, always_kept: int) -> None:
    scored = 96 - always_kept
    ours = recorded.prompt(model, policy).scores[..., :scored]
    torch.testing.assert_close(ours, recorded.tensors[f"{policy}/scores"][..., :scored], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["keydiff", "tova"])
def test_a_stream_keeps_the_same_entries_at_each_event(recorded: Any, model: GatedModel, policy: str) -> None:
    kept = torch.stack([event.kept for event in recorded.stream(model, policy)])
    assert kept.shape == (4, 2, 2, 32)
    assert torch.equal(kept, recorded.tensors[f"{policy}/stream"].long())


def test_attention_received_is_what_kvpress_observes(recorded: Any, model: GatedModel) -> None:
    """The policies differ (we keep a recent half, and sum), but what they are made of does not."""
    event = recorded.prompt(model, "h2o")
    observed = recording.observed_scores(event, group=2)
    torch.testing.assert_close(observed, recorded.tensors["observed/scores"], rtol=1e-5, atol=1e-6)
    best = observed.topk(32).indices.sort(-1).values
    assert torch.equal(best, recorded.tensors["observed/prompt"].long())
    # Of the published definition: the newest 16 stay, and 16 of the others by the sum.
    summed = recorded.tensors["observed/scores"] * torch.arange(96, 0, -1)
    heavy = summed[..., :80].topk(16).indices
    recent = torch.arange(80, 96).expand(2, 2, -1)
    assert torch.equal(event.kept, torch.cat([heavy, recent], -1).sort(-1).values)
