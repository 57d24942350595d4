"""How many entries are softly in the cache (TRIM-KV, arXiv 2512.03324: the sum in L_cap), in linear memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def retained(log_beta: Tensor, index: Tensor) -> Tensor:
    """``sum over i <= t of beta_i ** (t - i)``.

    Args:
        log_beta: ``[B, T, H]``.
        index: int64 ``[B, T]``, the place of each token in its stream, increasing along T.

    Returns:
        ``[B, H, T]``, at least float32; at most the number of tokens so far.
    """
    place, decay = index.double()[:, None], log_beta.double().transpose(1, 2)
    asked = torch.stack([place, torch.ones_like(place)], -1).expand(-1, decay.shape[1], -1, -1)
    held = torch.stack([decay, -place * decay], -1)
    # One more query in front keeps the rows of the causal mask in line with the one more key.
    total = _sum_exp(F.pad(asked, (0, 0, 1, 0)), held, causal=True)[:, :, 1:]
    return total.to(torch.promote_types(log_beta.dtype, torch.float32))


def skipped(log_beta: Tensor, skips: Tensor) -> Tensor:
    """What a skipped stretch would still hold, if its tokens were retained like those around it.

    Ours: makes the capacity loss see streams far longer than the training rows. The sum over the skipped ages is
    geometric, ``beta ** (a + 1) * (1 - beta ** gap) / (1 - beta)`` with ``a`` the tokens since the stream resumed.

    Args:
        log_beta: ``[B, T, H]``.
        skips: int64 ``[B, 4]``: tokens ``[start, end)`` stand for the skipped ones, the first token after the gap is
            ``resume``, and ``gap`` tokens were skipped (0: none).

    Returns:
        float32 ``[B, H, T]``, 0 before ``resume``.
    """
    length, out = log_beta.shape[1], []
    for row, (start, end, resume, gap) in enumerate(skips.tolist()):
        if not gap:
            out.append(log_beta.new_zeros(log_beta.shape[2], length, dtype=torch.float32))
            continue
        decay = log_beta[row, start:end].double().T.clamp(max=-1e-12)  # the quotient's limit is 0/0 at beta = 1
        each = torch.log(torch.expm1(gap * decay) / torch.expm1(decay))
        since = torch.arange(1, length - resume + 1, dtype=torch.float64, device=log_beta.device)
        asked = torch.stack([since, torch.ones_like(since)], -1).expand(1, len(decay), -1, -1)
        total = _sum_exp(asked, torch.stack([decay, each], -1)[None], causal=False)[0] / (end - start)
        out.append(F.pad(total, (resume, 0)).float())
    return torch.stack(out)


def _sum_exp(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """``sum over keys of exp(query . key)`` by the fused attention kernel, which keeps no matrix of them.

    One more key, of logit 0 and value 0, stands among keys of value 1: attention then gives ``S / (S + 1)``. In float64
    that can be undone for any S that a stream holds.

    Args:
        query: float64 ``[B, H, T, 2]``; key: float64 ``[B, H, S, 2]``.
        causal: query t sees the first t keys (query 0 none).

    Returns:
        float64 ``[B, H, T]``.
    """
    value = F.pad(torch.ones_like(key), (0, 0, 1, 0))
    share = F.scaled_dot_product_attention(query, F.pad(key, (0, 0, 1, 0)), value, is_causal=causal, scale=1.0)[..., 0]
    return share / (1 - share)
