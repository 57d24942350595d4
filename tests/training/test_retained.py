"""Softly retained entries, in blocks, and those of a skipped stretch, against loops in float64."""

from __future__ import annotations

import math

import dense_training as dense
import pytest
import torch

from trimkv_edge.training.retained import retained, skipped


@pytest.mark.parametrize("length", [1, 9, 130])
@pytest.mark.parametrize("jump", [0, 300])
def test_equals_the_dense_form(length: int, jump: int) -> None:
    inputs = dense.case(length, jump=jump)
    results = []
    for form in (lambda lb: retained(lb, inputs["index"]), lambda lb: dense.retained(lb, inputs["index"])):
        log_beta = inputs["log_beta"].clone().requires_grad_()
        out = form(log_beta)
        (out * torch.linspace(-1, 2, length)).sum().backward()
        results.append((out.detach(), log_beta.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_hand_written() -> None:
    log_beta = torch.tensor([[[math.log(0.5)], [math.log(0.25)], [0.0]]])
    held = retained(log_beta, torch.tensor([[0, 1, 3]]))
    torch.testing.assert_close(held, torch.tensor([[[1.0, 1.5, 0.5**3 + 0.25**2 + 1]]]))


@pytest.mark.parametrize("gap", [1, 7, 500])
def test_a_skipped_stretch_is_the_sum_over_its_tokens(gap: int) -> None:
    """Each skipped token is retained like the mean of tokens 2 to 4; the row goes on at place 5."""
    lb = dense.case(9, heads=2)["log_beta"].float()
    got = skipped(lb, torch.tensor([[2, 5, 5, gap], [0, 0, 0, 0]]))
    want = torch.zeros(2, 2, 9, dtype=torch.float64)
    for head in range(2):
        for t in range(5, 9):
            for age in range(t - 5 + 1, t - 5 + 1 + gap):
                want[0, head, t] += sum(math.exp(age * float(lb[0, i, head])) for i in (2, 3, 4)) / 3
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_gates_that_start_near_one_still_learn_from_a_gap() -> None:
    """At b = 18 log_beta is -1.5e-8: the sum over g ages falls by g * (g - 1) / 2 + g for each 1 of log_beta."""
    log_beta = torch.full((1, 3, 1), -1.5e-8, requires_grad=True)
    skipped(log_beta, torch.tensor([[0, 1, 2, 1000]]))[0, 0, 2].backward()
    assert log_beta.grad.flatten().tolist() == pytest.approx([1000 * 1001 / 2, 0.0, 0.0], rel=1e-3)


def test_many_entries_are_counted_exactly() -> None:
    held = retained(torch.zeros(1, 5000, 1), torch.arange(5000)[None])
    torch.testing.assert_close(held[0, 0], torch.arange(1.0, 5001.0), rtol=1e-6, atol=0)


def test_a_token_that_never_decays_holds_the_whole_gap() -> None:
    got = skipped(torch.zeros(1, 4, 1), torch.tensor([[0, 2, 2, 1000]]))
    torch.testing.assert_close(got, torch.tensor([[[0.0, 0.0, 1000.0, 1000.0]]]), rtol=1e-6, atol=0)
