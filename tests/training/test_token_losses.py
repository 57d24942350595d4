"""Cross-entropy and KL in blocks against sums over single tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from trimkv_edge.training.token_losses import token_losses


def test_sums_and_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, 5, generator=rng).requires_grad_()
    teacher, head = torch.randn(2, 9, 5, generator=rng), torch.randn(11, 5, generator=rng)
    targets = torch.randint(0, 11, (2, 9), generator=rng)
    weight = torch.rand(2, 9, generator=rng) * (torch.rand(2, 9, generator=rng) > 0.3)
    ce, kl = token_losses(student, teacher, lambda h: h @ head.T, targets, weight, block=4)
    (2 * ce + 3 * kl).backward()

    exact = student.detach().double().requires_grad_()
    want_ce = want_kl = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for t in range(9):
            q = (exact[row, t] @ head.double().T).softmax(-1)
            p = (teacher[row, t].double() @ head.double().T).softmax(-1)
            w = float(weight[row, t])
            want_ce = want_ce - w * q[targets[row, t]].log()
            want_kl = want_kl + w * (p * (p / q).log()).sum()
    (2 * want_ce + 3 * want_kl).backward()
    assert ce.item() == pytest.approx(want_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(want_kl.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_uniform_predictions() -> None:
    zero = torch.zeros(1, 3, 2)
    ce, kl = token_losses(
        zero, zero, lambda h: h @ torch.ones(2, 7), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
    )
    assert ce.item() == pytest.approx(3 * math.log(7))
    assert kl.item() == pytest.approx(0.0, abs=1e-6)


def test_unweighted_places_are_never_computed() -> None:
    made = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        made.append(len(hidden))
        return hidden @ torch.ones(2, 7)

    weight = torch.zeros(4, 8)
    weight[1, 3] = weight[2, 2] = 1.0
    token_losses(torch.zeros(4, 8, 2), torch.zeros(4, 8, 2), head, torch.zeros(4, 8, dtype=torch.int64), weight)
    assert made == [2, 2]
