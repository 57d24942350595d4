"""The training losses against loops in float64, written from the papers' formulas."""

import math

import pytest
import torch

from trimkv_edge.training import losses


def make(batch: int = 2, tokens: int = 9, heads: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    log_beta = -torch.rand(batch, tokens, heads, generator=generator, dtype=dtype) * 0.4
    steps = torch.randint(1, 5, (batch, tokens), generator=generator)
    return log_beta, steps.cumsum(1)


def brute_retained(log_beta: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    batch, tokens, heads = log_beta.shape
    out = torch.zeros(batch, heads, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                for i in range(t + 1):
                    out[b, h, t] += math.exp(log_beta[b, i, h].item()) ** (index[b, t] - index[b, i]).item()
    return out


def test_gated_attention_is_decayed_softmax() -> None:
    log_beta, index = make()
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 9, 9, generator=generator)
    got = (logits + losses.decay_bias(log_beta, index, groups=2)).softmax(-1)
    for b, h, t in ((0, 0, 0), (0, 5, 8), (1, 3, 4), (1, 2, 7)):
        weights = []
        for i in range(t + 1):
            beta = math.exp(log_beta[b, i, h // 2].item())
            weights.append(beta ** (index[b, t] - index[b, i]).item() * math.exp(logits[b, h, t, i].item()))
        want = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(got[b, h, t, : t + 1], want, rtol=1e-5, atol=1e-6)
        assert got[b, h, t, t + 1 :].eq(0).all()


def test_retained_matches_brute_force() -> None:
    log_beta, index = make()
    got = losses.retained(log_beta, index)
    torch.testing.assert_close(got.double(), brute_retained(log_beta, index), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resume", [1, 4, 8])
def test_skipped_tokens_count_like_tokens_that_were_there(resume: int) -> None:
    log_beta, _ = make(batch=1, seed=3)
    around = torch.zeros(9, dtype=torch.bool)
    around[[0, 2, 5]] = True
    gap = 50
    got = losses.retained_of_skipped(log_beta[0], around, resume, gap).double()
    want = torch.zeros_like(got)
    for h in range(3):
        for t in range(resume, 9):
            for age in range(t - resume + 1, t - resume + 1 + gap):
                want[h, t] += sum(math.exp(log_beta[0, i, h].item() * age) for i in (0, 2, 5)) / 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_skipped_tokens_with_beta_one_stay_finite() -> None:
    log_beta = torch.zeros(4, 1, requires_grad=True)
    held = losses.retained_of_skipped(log_beta, torch.ones(4, dtype=torch.bool), 2, 1000)
    held.sum().backward()
    assert torch.isfinite(log_beta.grad).all()
    torch.testing.assert_close(held[0], torch.tensor([0.0, 0.0, 1000.0, 1000.0]), rtol=1e-3, atol=1e-3)


def test_capacity_losses_match_the_formulas() -> None:
    layers = [make(seed=s) for s in range(2)]
    held = torch.stack([losses.retained(*layer) for layer in layers])
    brute = torch.stack([brute_retained(*layer) for layer in layers])
    memory, local, pooled = 2.0, 0.0, 0.0
    for b in range(2):
        for t in range(9):
            excess = [max(0.0, brute[m, b, h, t].item() - memory) for m in range(2) for h in range(3)]
            local += sum(excess) / (t + 1) / (2 * 3 * 2 * 9)
            total = brute[:, b, :, t].sum().item() - memory * 6
            pooled += max(0.0, total) / (t + 1) / 6 / (2 * 9)
    assert local > 0
    assert pooled > 0
    assert abs(local - pooled) > 1e-4
    assert losses.capacity_local(held, memory).item() == pytest.approx(local, rel=1e-5)
    assert losses.capacity_global(held, memory).item() == pytest.approx(pooled, rel=1e-5)


def test_capacity_gradient_is_the_derivative() -> None:
    log_beta, index = make()
    log_beta.requires_grad_()
    losses.capacity_local(losses.retained(log_beta, index), 2.0).backward()
    age = (index[:, :, None] - index[:, None]).double()
    lb = log_beta.detach().double()
    over = brute_retained(log_beta.detach(), index) > 2.0
    for b, i, h in ((0, 0, 0), (1, 3, 2), (0, 7, 1)):
        want = 0.0
        for t in range(i, 9):
            if over[b, h, t]:
                want += (age[b, t, i] * torch.exp(age[b, t, i] * lb[b, i, h])).item() / (t + 1)
        assert log_beta.grad[b, i, h].item() == pytest.approx(want / (2 * 3 * 9), rel=1e-4, abs=1e-9)


def test_forward_kl_is_weighted_and_ordered() -> None:
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    weight = torch.rand(2, 5, generator=generator)
    each = [
        [
            sum(
                p[b, t].softmax(-1)[v].item() * math.log(p[b, t].softmax(-1)[v] / q[b, t].softmax(-1)[v])
                for v in range(7)
            )
            for t in range(5)
        ]
        for b in range(2)
    ]
    want = (torch.tensor(each) * weight).sum() / weight.sum()
    torch.testing.assert_close(losses.forward_kl(p, q, weight), want, rtol=1e-4, atol=1e-6)
    assert losses.forward_kl(p, p, weight).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.forward_kl(q, p, weight).item() != pytest.approx(want.item(), rel=1e-3)
