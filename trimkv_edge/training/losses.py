"""Losses that train retention gates on a frozen model (TRIM-KV, arXiv 2512.03324; DBTrimKV, arXiv 2605.09649).

Shapes: B rows, T tokens, H KV heads, L layers. `index` is int64 [B, T], the place of each token in the stream,
increasing along T; it may jump where a stretch of the stream was skipped. Ages are differences of it, in float32. All
results are float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -1e30  # not -inf: fused attention kernels turn it into NaN


def ages(index: Tensor) -> Tensor:
    """Age `t - i` of key i at query t, [B, T, T] float32; negative where the key lies in the future."""
    return (index[:, :, None] - index[:, None, :]).float()


def decay_bias(log_beta: Tensor, index: Tensor, groups: int = 1) -> Tensor:
    """Retention-gated attention as an additive bias: `(t - i) * log_beta_i` on the scaled logit (TRIM-KV, equation 3).

    Args:
        log_beta: [B, T, H], each at most 0.
        index: [B, T].
        groups: query heads per KV head; each of them uses its KV head's retention.

    Returns:
        [B, H * groups, T, T], `MASKED` where the key lies in the future.
    """
    age = ages(index)[:, None]
    bias = log_beta.float().transpose(1, 2)[:, :, None, :] * age.clamp(min=0)
    return bias.masked_fill(age < 0, MASKED).repeat_interleave(groups, dim=1)


def retained(log_beta: Tensor, index: Tensor) -> Tensor:
    """Entries that are softly in the cache at each time, `sum over i <= t of beta_i ** (t - i)`.

    Args:
        log_beta: [B, T, H].
        index: [B, T].

    Returns:
        [B, H, T], at most the number of tokens so far.
    """
    age = ages(index)[:, None]
    weight = torch.exp(log_beta.float().transpose(1, 2)[:, :, None, :] * age.clamp(min=0))
    return weight.masked_fill(age < 0, 0.0).sum(-1)


def retained_of_skipped(log_beta: Tensor, around: Tensor, resume: int, gap: int) -> Tensor:
    """What a skipped stretch of `gap` tokens would still hold, if its tokens were retained like the tokens `around` it.

    Ours: makes the capacity loss see streams far longer than the training rows. The sum over the skipped ages is
    geometric, `beta ** (a + 1) * (1 - beta ** gap) / (1 - beta)` with `a` the tokens since the stream resumed.

    Args:
        log_beta: [T, H] of one row.
        around: bool [T], at least one True, the tokens that stand for the skipped ones.
        resume: row index of the first token after the gap.
        gap: tokens that were skipped.

    Returns:
        [H, T], 0 before `resume`.
    """
    lb = log_beta.float()[around].clamp(max=-1e-7)  # the quotient's limit is 0/0 at beta = 1
    total = torch.expm1(gap * lb) / torch.expm1(lb)
    since = torch.arange(log_beta.shape[0] - resume, dtype=torch.float32) + 1
    mean = (torch.exp(since[:, None, None] * lb) * total).mean(1)
    return F.pad(mean.T, (resume, 0))


def capacity_local(held: Tensor, memory: float) -> Tensor:
    """`mean over t of max(0, held_t - M) / t`, averaged over layers, rows and heads (TRIM-KV, equation of L_cap).

    Args:
        held: [..., T], from `retained`; t counts from 1.
        memory: budget M of each head.
    """
    time = torch.arange(1, held.shape[-1] + 1, dtype=torch.float32)
    return (F.relu(held - memory) / time).mean()


def capacity_global(held: Tensor, memory: float) -> Tensor:
    """The same for one pool of `M * L * H` entries over all layers and heads (DBTrimKV, L_cap), per entry of the pool.

    Args:
        held: [L, B, H, T], from `retained` of every layer.
        memory: budget M per head on average.
    """
    return capacity_local(held.mean(dim=(0, 2)), memory)


def forward_kl(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """`KL(teacher || student)` per token in nats, averaged with `weight`.

    Args:
        teacher, student: logits [B, T, V].
        weight: [B, T], not all 0.
    """
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (each * weight).sum() / weight.sum()
