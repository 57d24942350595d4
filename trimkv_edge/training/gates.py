"""Train retention gates on a frozen decoder: one gated pass, one full-cache pass of the same weights, three losses.

The model is called as `model(ids, positions, backend, last_only)`, see `trimkv_edge.models.gated.GatedModel`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_edge.training import losses
from trimkv_edge.training.backends import DecayedAttention, FullAttention


@dataclass
class GateBatch:
    """Rows to train on.

    Attributes:
        ids: int64 [B,T].
        index: int64 [B,T], the place of each token in its stream: age and RoPE position.
        weight: float [B,T], weighs the prediction of each token.
        skips: (row, around, resume, gap) of each skipped stretch, see `losses.retained_of_skipped`.
    """

    ids: Tensor
    index: Tensor
    weight: Tensor
    skips: list[tuple[int, Tensor, int, int]] = field(default_factory=list)


def gate_losses(model: nn.Module, batch: GateBatch, memory: float, pooled: bool) -> dict[str, Tensor]:
    """The three losses: `ce` and `kl` in nats per weighted token, and `capacity` at `memory` entries per head.

    Args:
        model: decoder with gates; only the gates ask for gradients.
        batch: rows.
        memory: budget M per head (`pooled`: on average).
        pooled: one budget over all layers and heads (the loss of `rg10`), else one for each head (that of `rg`).
    """
    backend = DecayedAttention(batch.index)
    logits = model(batch.ids, batch.index, backend, last_only=False)[:, :-1]
    with torch.no_grad():
        teacher = model(batch.ids, batch.index, FullAttention(), last_only=False)[:, :-1]
    log_betas = [backend.log_beta[layer] for layer in sorted(backend.log_beta)]
    weight = batch.weight[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none").view_as(weight)
    held = torch.stack([losses.retained(log_beta, batch.index) for log_beta in log_betas])
    skipped = torch.zeros_like(held)
    for row, around, resume, gap in batch.skips:
        for layer, log_beta in enumerate(log_betas):
            skipped[layer, row] = losses.retained_of_skipped(log_beta[row], around, resume, gap)
    capacity = losses.capacity_global if pooled else losses.capacity_local
    return {
        "ce": (each * weight).sum() / weight.sum(),
        "kl": losses.forward_kl(teacher, logits, weight),
        "capacity": capacity(held + skipped, memory),
    }


def train_gates(
    model: nn.Module,
    gates: nn.Module,
    batches: Iterator[GateBatch],
    steps: int,
    memory: float,
    pooled: bool,
    lr: float = 2e-3,
) -> Iterator[tuple[int, dict[str, float]]]:
    """AdamW with warm-up and cosine decay on `gates`; yields the step number and its losses after each step."""
    optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        parts = gate_losses(model, next(batches), memory, pooled)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, {name: part.item() for name, part in parts.items()}
