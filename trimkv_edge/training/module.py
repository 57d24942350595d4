"""What the Trainer trains: the gates, with the frozen model beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimkv_edge.training.backends import DecayedAttention, FullAttention
from trimkv_edge.training.config import TrainConfig
from trimkv_edge.training.losses import capacity
from trimkv_edge.training.retained import retained, skipped
from trimkv_edge.training.token_losses import token_losses


class GateModule(nn.Module):
    """Losses of a gated and a vanilla pass of the same frozen weights.

    Only the gates are registered as parameters. The base is held aside, so that distributed training copies,
    optimiser states and checkpoints see the gates alone.

    Args:
        base: a causal LM of transformers whose attention layers already call the gates (`GatedModel.base`).
        gates: the gates of its layers.
        config: settings.
    """

    def __init__(self, base: Any, gates: nn.ModuleList, config: TrainConfig) -> None:
        super().__init__()
        self.gates = gates
        self.settings = config
        self._aside = (base.eval(),)
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        for parameter in gates.parameters():
            parameter.requires_grad_(True)
        if config.dtype == "bfloat16":
            _cast(base, gates, torch.bfloat16)
        if config.gradient_checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
            # transformers recomputes layers that are in training mode; their children stay in eval mode: no dropout.
            for layer in base.model.layers:
                layer.training = True

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._aside[0]

    def train(self, mode: bool = True) -> GateModule:
        """The base stays as it is; the gates have no dropout."""
        super().train(mode)
        return self

    def forward(
        self, input_ids: Tensor, index: Tensor, weight: Tensor, skips: Tensor, held: Tensor
    ) -> dict[str, Tensor]:
        """Sums over the rows, to be divided by the whole step's token weight (`ce`, `kl`) and rows (`capacity`).

        Args:
            input_ids: int64 [B,T].
            index: int64 [B,T], places in the stream.
            weight: float32 [B,T], weighs the prediction of each token.
            skips: int64 [B,4], see :class:`trimkv_edge.training.rows.Row`.
            held: int64 [B], tokens of each row that are not padding.
        """
        with torch.no_grad():
            teacher = self._hidden(input_ids, index, FullAttention())
        backend = DecayedAttention(index)
        hidden = self._hidden(input_ids, index, backend)
        log_betas = [backend.log_beta[layer] for layer in range(len(self.gates))]
        entries = torch.stack([retained(log_beta, index) + skipped(log_beta, skips) for log_beta in log_betas])
        # The t of the capacity loss counts the row's tokens. Counted in the stream, rows that skip 100,000 tokens would
        # weigh a hundredth of the others, and gates would not learn to forget what was skipped.
        places = torch.arange(index.shape[1], device=index.device).expand_as(index)
        valid = places < held[:, None]
        ce, kl = token_losses(
            hidden[:, :-1],
            teacher[:, :-1],
            self.base.lm_head,
            input_ids[:, 1:],
            weight[:, 1:],
            block=self.settings.block,
        )
        config = self.settings
        rows = capacity(entries, places, config.memory, scope=config.scope, form=config.capacity_form, valid=valid)
        return {"ce": ce, "kl": kl, "capacity": rows.sum()}

    def _hidden(self, input_ids: Tensor, index: Tensor, backend: Any) -> Tensor:
        out = self.base.model(input_ids=input_ids, position_ids=index, use_cache=False, trimkv_backend=backend)
        return out.last_hidden_state


def _cast(base: nn.Module, gates: nn.ModuleList, dtype: torch.dtype) -> None:
    """Casts the base's parameters. Buffers stay: rotary frequencies in bf16 would put tokens at wrong places."""
    kept = {id(parameter) for parameter in gates.parameters()}
    for parameter in base.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
