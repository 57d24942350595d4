"""Gates and scores against float64 re-implementations."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from oracle import oracle_score

from trimkv_edge.errors import ConfigError
from trimkv_edge.retention import RetentionGate, build_gates, log_sigmoid, retention_score

ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def exact_log_sigmoid(z: float) -> float:
    with mpmath.workdps(60):
        return float(-mpmath.log1p(mpmath.exp(-mpmath.mpf(z))))


def as64(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().double().numpy()


def spread(gate: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("act", ACTS)
def test_gate_equals_numpy(kind: str, act: str) -> None:
    gate = RetentionGate(24, 3, 16, kind, act)
    spread(gate, 1)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    hidden = ACTS[act](as64(x) @ as64(gate.linear1.weight).T + as64(gate.linear1.bias))
    if kind == "rg":
        assert gate.linear2.bias is None
        z = hidden @ as64(gate.linear2.weight).T + as64(gate.bias)
    else:
        assert gate.linear3.bias is None
        hidden = ACTS[act](hidden @ as64(gate.linear2.weight).T + as64(gate.linear2.bias))
        z = hidden @ as64(gate.linear3.weight).T + as64(gate.bias)
    want = np.vectorize(exact_log_sigmoid)(z)
    got = gate(x)
    assert got.shape == (2, 5, 3)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(as64(got), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_gate_reads_bf16_and_answers_in_float32(kind: str) -> None:
    gate = RetentionGate(8, 2, 4, kind)
    assert gate(torch.ones(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert gate.bfloat16()(torch.ones(1, 3, 8)).dtype == torch.float32


def test_new_gates_start_near_one_and_strictly_below() -> None:
    gate = RetentionGate(8, 2, 4, bias_init=18.0)
    log_beta = gate(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    assert bool((log_beta < 0).all())
    assert bool((log_beta > -1e-7).all())


def test_log_sigmoid_is_exact_over_the_whole_range() -> None:
    zs = np.concatenate([np.arange(-100, 41, dtype=np.float32), np.linspace(-22, 22, 701, dtype=np.float32)])
    got = log_sigmoid(torch.from_numpy(zs)).numpy()
    want = [exact_log_sigmoid(float(z)) for z in zs]
    np.testing.assert_allclose(got, want, rtol=5e-7)


def test_log_sigmoid_keeps_the_ranking_of_trained_gates() -> None:
    z = torch.linspace(18, 30, 97)
    got = log_sigmoid(z)
    assert bool((got < 0).all())
    assert bool((got.diff() > 0).all())
    assert bool((torch.log(torch.sigmoid(z)) == 0).any()), "the trap this guards against is gone"


def test_rg10_layers_share_the_final_projection() -> None:
    gates = build_gates("rg10", 3, 8, 2, 4)
    assert all(gate.linear3 is gates[0].linear3 and gate.bias is gates[0].bias for gate in gates)
    assert len({id(gate.linear1) for gate in gates}) == 3
    assert len({id(gate.linear2) for gate in gates}) == 3
    # d->I, I->I per layer; I->H and H once.
    assert sum(p.numel() for p in gates.parameters()) == 3 * (8 * 4 + 4 + 4 * 4 + 4) + 4 * 2 + 2


def test_rg10_gradients_add_up_once_over_layers() -> None:
    gates = build_gates("rg10", 3, 8, 2, 4)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    alone = []
    for gate in gates:
        gates.zero_grad()
        gate.logit(x).sum().backward()
        alone.append(gates[0].linear3.weight.grad.clone())
        torch.testing.assert_close(gates[0].bias.grad, torch.full((2,), 5.0))
    gates.zero_grad()
    sum(gate.logit(x).sum() for gate in gates).backward()
    torch.testing.assert_close(gates[0].linear3.weight.grad, sum(alone))
    torch.testing.assert_close(gates[0].bias.grad, torch.full((2,), 15.0))


def test_rg_layers_share_nothing() -> None:
    gates = build_gates("rg", 3, 8, 2, 4)
    assert len({id(p) for gate in gates for p in gate.parameters()}) == 3 * 4


@pytest.mark.parametrize(("kind", "act", "named"), [("rg3", "silu", "rg3"), ("rg", "nonsense", "nonsense")])
def test_unknown_kind_or_activation(kind: str, act: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RetentionGate(8, 2, 4, kind, act)


LOG_BETAS = [
    0.0,
    -0.0,
    -1e-38,
    -1e-45,
    -1e-30,
    -1e-20,
    -1e-9,
    -1e-7,
    -3e-5,
    -1e-3,
    -0.1,
    -0.69,
    -0.7,
    -2.0,
    -50.0,
    -1e4,
]


@pytest.mark.parametrize("seen", [1, 40, 2**24 + 5, 2**31 + 9])
def test_single_step_score_is_one_rounding(seen: int) -> None:
    positions = [p for p in (0, 1, seen - 30, seen - 2, seen - 1) if 0 <= p < seen]
    table = [(lb, p) for lb in [*LOG_BETAS, -1e38] for p in positions]
    got = retention_score(torch.tensor([lb for lb, _ in table]), torch.tensor([p for _, p in table]), seen)
    assert got.dtype == torch.float32
    assert got.tolist() == [oracle_score(lb, p, seen) for lb, p in table]


def test_seen_may_be_a_tensor() -> None:
    log_beta, positions = torch.tensor([-0.5, -0.25]), torch.tensor([3, 4])
    got = retention_score(log_beta, positions, torch.tensor([9]))
    assert got.tolist() == [-3.5, -1.5]


@pytest.mark.parametrize("lookahead", [2, 3, 16, 128])
@pytest.mark.parametrize("seen", [1, 40, 5000])
def test_look_ahead_score_is_the_log_of_the_geometric_sum(lookahead: int, seen: int) -> None:
    for log_beta in LOG_BETAS:
        for position in {0, seen // 2, seen - 1}:
            got = float(retention_score(torch.tensor([log_beta]), torch.tensor([position]), seen, lookahead))
            with mpmath.workdps(50):
                beta = mpmath.exp(mpmath.mpf(float(np.float32(log_beta))))
                age = seen + 2 - position
                want = float(mpmath.log(mpmath.fsum(beta ** (age + i) for i in range(lookahead))))
            assert got == pytest.approx(want, rel=1e-6, abs=1e-6), (log_beta, position)


def test_look_ahead_ranks_nearly_lasting_entries_by_age() -> None:
    """Of entries with equal log-beta near 0 the older must score lower; rounding may tie them but never swap them."""
    for exponent in range(-12, 0):
        for log_beta in -(10.0**exponent) * np.linspace(1, 9.9, 40):
            positions = torch.arange(0, 100, dtype=torch.int64)
            scores = retention_score(torch.full((100,), float(log_beta)), positions, 100, 16)
            assert bool((scores.diff() >= 0).all())


def test_look_ahead_never_ranks_a_clearly_better_beta_lower() -> None:
    """With equal age a log-beta at least a tenth closer to 0 never scores lower beyond float32 rounding of log(k)."""
    log_beta = -torch.logspace(-12, 1, 300, dtype=torch.float64).float()
    scores = retention_score(log_beta, torch.zeros(300, dtype=torch.int64), 50, 16)
    assert float(scores.diff().max()) <= 5e-7
