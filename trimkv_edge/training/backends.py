"""Attention of training: whole rows at once, no cache (protocol `trimkv_edge.models.attention.AttentionBackend`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.training.attention import decayed_attention


class FullAttention:
    """Plain causal attention by index: what the frozen model does with its full cache.

    transformers' own masks do not do: where positions jump they see the start of another packed document.
    """

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Retention plays no part here."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B,Hq,T,D], key and value [B,H,T,D] -> [B,T,Hq,D]."""
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


class DecayedAttention:
    """Retention-gated attention (TRIM-KV, equation 3).

    Args:
        index: int64 [B,T], the place of each token in its stream.

    Attributes:
        log_beta: the layers' log-betas of this pass, each [B,T,H], for the capacity loss.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.log_beta: dict[int, Tensor] = {}
        self._latest: dict[int, Tensor] = {}

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Takes the log-betas of the rows. Gradient checkpointing calls this again in the backward pass: attention then
        uses the new tensor, the loss keeps the first."""
        self.log_beta.setdefault(layer, log_beta)
        self._latest[layer] = log_beta

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B,Hq,T,D], key and value [B,H,T,D] -> [B,T,Hq,D]."""
        return decayed_attention(query, key, value, self._latest[layer], self.index, scale)
