"""Retention gates and the scores made from them (TRIM-KV, arXiv 2512.03324; DBTrimKV, arXiv 2605.09649).

A gate reads the hidden state that feeds a layer's q/k/v projections and gives, per KV head, ``log_beta <= 0``: the
log of how much of the token's usefulness is left after each further step. An entry's retention at age ``a`` is
``beta ** a``. Everything here is float32: in bf16, betas near 1 tie by the thousand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from trimkv_edge.errors import ConfigError

GATE_KINDS = ("rg", "rg10")


def log_sigmoid(z: Tensor) -> Tensor:
    """``log(sigmoid(z))`` as ``-softplus(-z)``; the naive form is 0 in float32 for z >= 17 and destroys the ranking."""
    return -F.softplus(-z)


class RetentionGate(nn.Module):
    """One layer's retention gate.

    ``rg``   : ``log_beta = log_sigmoid(W2 act(W1 x + b1) + b)``
    ``rg10`` : ``log_beta = log_sigmoid(W3 act(W2 act(W1 x + b1) + b2) + b)``; W3 and b are shared by all layers
    (the shared final scoring projection, see :func:`build_gates`).

    Parameter names are those of the published gates.

    Args:
        hidden_size: width d of the hidden state.
        num_kv_heads: number of KV heads H.
        intermediate_size: width I of the gate.
        kind: ``rg`` or ``rg10``.
        act: name of the activation, the model's ``hidden_act``.
        bias_init: initial value of ``b``; 8 to 18 in the published trainings (beta starts near 1).

    Raises:
        ConfigError: unknown kind or activation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_kv_heads: int,
        intermediate_size: int,
        kind: str = "rg",
        act: str = "silu",
        bias_init: float = 8.0,
    ) -> None:
        super().__init__()
        if kind not in GATE_KINDS:
            raise ConfigError(f"gate kind {kind!r} is not known; use one of {', '.join(GATE_KINDS)}")
        if act not in ACT2FN:
            raise ConfigError(f"gate activation {act!r} is not known to transformers")
        self.kind = kind
        self.act = ACT2FN[act]
        self.linear1 = nn.Linear(hidden_size, intermediate_size)
        if kind == "rg":
            self.linear2 = nn.Linear(intermediate_size, num_kv_heads, bias=False)
        else:
            self.linear2 = nn.Linear(intermediate_size, intermediate_size)
            self.linear3 = nn.Linear(intermediate_size, num_kv_heads, bias=False)
        self.bias = nn.Parameter(torch.full((num_kv_heads,), float(bias_init)))
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif name.startswith("linear"):
                nn.init.zeros_(parameter)

    def logit(self, x: Tensor) -> Tensor:
        """Raw gate logit z, ``[..., hidden_size] -> [..., num_kv_heads]``."""
        hidden = self.act(self.linear1(x.to(self.bias.dtype)))
        if self.kind == "rg":
            return self.linear2(hidden) + self.bias
        return self.linear3(self.act(self.linear2(hidden))) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> log_beta [..., num_kv_heads]`` in float32."""
        return log_sigmoid(self.logit(x).float())


class NoGate(nn.Module):
    """Stands where a model has no gate: every log-beta is 0. For policies that do not read them."""

    kind = "none"

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> zeros [..., num_kv_heads]`` in float32."""
        return x.new_zeros(*x.shape[:-1], self.num_kv_heads, dtype=torch.float32)


def build_gates(
    kind: str,
    num_layers: int,
    hidden_size: int,
    num_kv_heads: int,
    intermediate_size: int,
    act: str = "silu",
    bias_init: float = 8.0,
) -> nn.ModuleList:
    """One gate per layer; for ``rg10`` all layers share ``linear3`` and ``bias`` (the same Parameter objects)."""
    gates = nn.ModuleList(
        RetentionGate(hidden_size, num_kv_heads, intermediate_size, kind, act, bias_init) for _ in range(num_layers)
    )
    if kind == "rg10":
        for gate in gates:
            gate.linear3 = gates[0].linear3
            gate.bias = gates[0].bias
    return gates


def retention_score(log_beta: Tensor, positions: Tensor, seen: Tensor | int, lookahead: int = 1) -> Tensor:
    """Score of each entry once ``seen`` tokens were read, including the newest.

    Single-step: ``s = log_beta * (seen + 1 - pos)``. Look-ahead over k > 1 steps: the log of
    ``sum(beta ** (a + i) for i in range(k))`` with ``a = seen + 2 - pos``, in closed form
    ``a lb + log1mexp(k lb) - log1mexp(lb)`` (research notes of the papers' code, section 5.1).

    Args:
        log_beta: float32, any shape.
        positions: int64, absolute, 0-based, same shape. Ages are exact integers before the one rounding to float32.
        seen: number of tokens of the stream so far.
        lookahead: k.

    Returns:
        float32 scores of the same shape; the lowest leave first.
    """
    if lookahead == 1:
        return log_beta * (seen + 1 - positions).to(torch.float32)
    age = (seen + 2 - positions).to(torch.float32)
    # One quotient: the difference of the two logs (each near log|lb|) would cost the ranking of betas near 1.
    gain = torch.log(torch.expm1(lookahead * log_beta) / torch.expm1(log_beta))
    # At beta = 1 the geometric sum is k; for betas that round to it the quotient would be 0/0.
    gain = torch.where(log_beta > -1e-30, torch.log(torch.tensor(float(lookahead))), gain)
    return age * log_beta + gain
