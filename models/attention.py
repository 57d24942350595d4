"""How transformers' own modelling code is made to use a bounded cache: its attention interface and one pre-hook.

A forward pass carries a *backend* as the keyword ``trimkv_backend``. Each attention layer hands its log-betas and its
query, key and value to it; the backend decides where they are kept and how attention runs (torch cache, ExecuTorch
operators, ONNX operators, training). No mask is built: transformers skips masks for attention functions that have no
mask function of the same name.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "trimkv"
BACKEND_KEYWORD = "trimkv_backend"


class AttentionBackend(Protocol):
    """Append + attend, once per layer and forward pass; ``retain`` of a layer comes before its ``attend``."""

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Takes the chunk's log-betas, float32 ``[batch, T, kv_heads]``."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query ``[batch, heads, T, head_dim]``, key and value ``[batch, kv_heads, T, head_dim]`` (after RoPE) ->
        ``[batch, T, heads, head_dim]``."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    trimkv_backend: AttentionBackend,
    **_: Any,
) -> tuple[Tensor, None]:
    return trimkv_backend.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]


def _retain(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    kwargs[BACKEND_KEYWORD].retain(module.layer_idx, module.retention_gate(hidden))  # type: ignore[operator]


AttentionInterface.register(ATTENTION_NAME, _attention)


def attach_gates(attentions: list[nn.Module], gates: nn.ModuleList) -> None:
    """Puts gate n beside attention layer n; it reads the normed hidden state that feeds q/k/v."""
    for attention, gate in zip(attentions, gates, strict=True):
        attention.retention_gate = gate
        attention.register_forward_pre_hook(_retain, with_kwargs=True)
