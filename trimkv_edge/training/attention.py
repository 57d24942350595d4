"""Retention-gated attention of training in linear memory (TRIM-KV, arXiv 2512.03324, equation 3).

Key i has the weight ``beta_i ** (t - i) * exp(q_t . k_i * scale)`` at query t: ``(t - i) * log_beta_i`` is added to the
scaled logit. Ages come from ``index``, the place of each token in its stream, which may jump along a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # FlexAttention's block of queries and of keys


def decayed_attention(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Exact on every device: FlexAttention on CUDA, torch's blockwise kernel elsewhere.

    Args:
        query: ``[B, Hq, T, D]``; key, value: ``[B, H, T, D]``.
        log_beta: ``[B, T, H]``, at most 0; the query heads of a group share their KV head's.
        index: int64 ``[B, T]``, increasing along T.
        scale: of the logits.

    Returns:
        ``[B, T, Hq, D]``.
    """
    form = flex_form if query.is_cuda else blockwise_form
    return form(query, key, value, log_beta, index, scale).transpose(1, 2)


def blockwise_form(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, index: Tensor, scale: float) -> Tensor:
    """The decay as two more dimensions of queries and keys, through ordinary causal attention.

    ``(t - i) * log_beta_i = t * log_beta_i + 1 * (-i * log_beta_i)``: a dot product, so the fused kernel with its
    blocks, and its gradient, serve as they are. The two terms cancel near t = i, hence float64: exact to 1e-9 for
    streams of 10^6 tokens.

    Arguments and result as :func:`decayed_attention`, but ``[B, Hq, T, D]``.
    """
    groups = query.shape[1] // key.shape[1]
    place, decay = index.double()[:, None], log_beta.double().transpose(1, 2)
    more = torch.stack([place, torch.ones_like(place)], -1).expand(-1, query.shape[1], -1, -1)
    asked = torch.cat([query.double() * scale, more], -1)
    held = torch.cat([key.double(), torch.stack([decay, -place * decay], -1)], -1)
    given = F.pad(value.double(), (0, 2))  # the kernel wants values as wide as keys
    if groups > 1:
        held, given = held.repeat_interleave(groups, 1), given.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(asked, held, given, is_causal=True, scale=1.0)
    return out[..., :-2].to(query.dtype)


def flex_form(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, index: Tensor, scale: float) -> Tensor:
    """The decay as FlexAttention's ``score_mod``, in float32. Compiled on CUDA; elsewhere its eager form, which is
    quadratic in memory and serves to check this function. The compiled form was not run where this was written.

    Arguments and result as :func:`blockwise_form`.
    """
    from torch.nn.attention.flex_attention import flex_attention

    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    decay = log_beta.to(torch.promote_types(log_beta.dtype, torch.float32)).transpose(1, 2).contiguous()

    def score_mod(score: Tensor, row: Tensor, head: Tensor, at: Tensor, place: Tensor) -> Tensor:
        age = index[row, at] - index[row, place]
        return score + decay[row, head // groups, place] * age

    run: Any = _compiled() if query.is_cuda else flex_attention
    mask = causal_blocks(length, query.device)
    return run(query, key, value, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=groups > 1)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=4)
def causal_blocks(length: int, device: torch.device) -> Any:
    """FlexAttention's causal block mask, from block numbers: ``create_block_mask`` fills a T x T matrix first."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-length // _BLOCK)
    place = torch.arange(blocks, dtype=torch.int32, device=device)
    whole = place.repeat(blocks, 1)[None, None].contiguous()  # of row r, its first r entries count
    partial = torch.zeros_like(whole)
    partial[..., 0] = place  # the diagonal
    ones = torch.ones(1, 1, blocks, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(
        ones,
        partial,
        place[None, None].contiguous(),
        whole,
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda row, head, at, key: at >= key,
        seq_lengths=(length, length),
    )
