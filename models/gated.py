"""A frozen decoder with retention gates, driven through an :class:`~trimkv_edge.models.attention.AttentionBackend`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_edge.models.attention import ATTENTION_NAME, BACKEND_KEYWORD, AttentionBackend, attach_gates
from trimkv_edge.models.family import text_config, text_decoder


class GatedModel(nn.Module):
    """A transformers causal LM whose attention layers carry retention gates.

    Args:
        base: model of a supported family, its rotary embedding already fixed (see :mod:`trimkv_edge.models.rope`).
        gates: one gate per layer.

    Attributes:
        config: the decoder's configuration (``text_config`` of a vision-language model).
    """

    def __init__(self, base: PreTrainedModel, gates: nn.ModuleList) -> None:
        super().__init__()
        self.base = base
        self.config = text_config(base.config)
        attach_gates([layer.self_attn for layer in text_decoder(base).layers], gates)
        self.config._attn_implementation = ATTENTION_NAME
        self.config.use_cache = False

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, backend: AttentionBackend, last_only: bool = True
    ) -> Tensor:
        """Reads a chunk.

        Args:
            input_ids: int64 ``[batch, T]``.
            position_ids: int64 ``[batch, T]`` or ``[1, T]``, absolute; independent of where entries are kept.
            backend: takes each layer's entries and attends.
            last_only: logits of the last token only.

        Returns:
            logits ``[batch, 1 or T, vocab_size]``.
        """
        out = self.base(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=1 if last_only else 0,
            **{BACKEND_KEYWORD: backend},
        )
        logits: Tensor = out.logits
        return logits

    @property
    def head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def sizes(self) -> dict[str, int]:
        """What an :class:`~trimkv_edge.engine.Engine` wants to know, by the names of its arguments."""
        return {
            "num_layers": self.config.num_hidden_layers,
            "num_kv_heads": self.config.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.config.vocab_size,
        }

    @property
    def gates(self) -> list[nn.Module]:
        return [layer.self_attn.retention_gate for layer in text_decoder(self.base).layers]


def chunk_positions(start: int | Tensor, count: int) -> Tensor:
    """Absolute positions ``[1, count]`` of a chunk that begins at ``start``."""
    return (torch.arange(count, dtype=torch.int64) + start).unsqueeze(0)
