"""Cross-entropy and forward KL per token without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 1024


def token_losses(
    student: Tensor,
    teacher: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    weight: Tensor,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Weighted sums, in nats, of next-token cross-entropy and of ``KL(teacher || student)`` (TRIM-KV, losses).

    Args:
        student, teacher: hidden states after the final norm ``[B, T, d]``; the teacher's take no gradient.
        lm_head: hidden states -> logits.
        targets: int64 ``[B, T]``, what each place has to predict.
        weight: float ``[B, T]``; places of weight 0 cost nothing.
        block: places whose logits exist at once.

    Returns:
        (cross-entropy, KL), two float32 scalars.
    """
    used = weight.flatten().nonzero().squeeze(-1)
    total = student.new_zeros(2, dtype=torch.float32)
    for chosen in used.split(block):
        picked = (tensor.flatten(0, 1)[chosen] for tensor in (student, teacher, targets, weight))
        total = total + checkpoint(_block, lm_head, *picked, use_reentrant=False)
    return total[0], total[1]


def _block(
    lm_head: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    log_q = lm_head(student).float().log_softmax(-1)
    with torch.no_grad():
        log_p = lm_head(teacher).float().log_softmax(-1)
    ce = F.nll_loss(log_q, targets, reduction="none")
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return torch.stack([(ce * weight).sum(), (kl * weight).sum()])
