"""Retention-gated attention and its losses, dense and in float64, written from the papers' formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def ages(index: Tensor) -> Tensor:
    """Age of key i at query t, float64 ``[B, T, T]``; negative for keys of the future."""
    return (index[:, :, None] - index[:, None, :]).double()


def attention(q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, index: Tensor, scale: float) -> Tensor:
    """``[B, Hq, T, D]``, every query head written out."""
    groups = q.shape[1] // k.shape[1]
    age = ages(index)
    heads = []
    for head in range(q.shape[1]):
        own = head // groups
        logits = torch.einsum("btd,bsd->bts", q[:, head], k[:, own]) * scale + age * log_beta[:, :, own][:, None, :]
        weight = torch.where(age >= 0, logits, -torch.inf).softmax(-1)
        heads.append(weight @ v[:, own])
    return torch.stack(heads, 1)


def retained(log_beta: Tensor, index: Tensor) -> Tensor:
    """``[B, H, T]``."""
    age = ages(index)[:, None]
    weight = torch.exp(log_beta.transpose(1, 2)[:, :, None, :] * age.clamp(min=0))
    return torch.where(age >= 0, weight, 0.0).sum(-1)


def case(
    length: int, heads: int = 2, groups: int = 2, dim: int = 4, rows: int = 2, seed: int = 0, jump: int = 0
) -> dict[str, Tensor]:
    """Random inputs in float64; from the middle of each row on, places jump by ``jump``."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    index = torch.arange(length).repeat(rows, 1)
    index[:, length // 2 :] += jump
    return {
        "q": normal(rows, heads * groups, length, dim),
        "k": normal(rows, heads, length, dim),
        "v": normal(rows, heads, length, dim),
        "log_beta": -torch.exp(3 * normal(rows, length, heads) - 3),
        "index": index,
    }
