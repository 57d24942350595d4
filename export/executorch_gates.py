"""The gates of an ExecuTorch program: a method of their own, which reads many tokens at once.

Log-betas are needed by events and saved states alone. In ``forward`` gates would read their weights from memory for
every token; so ``forward`` gives back what they read, and a runner keeps that until ``gates`` is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from trimkv_edge.export.executorch_cache import ExportCache
from trimkv_edge.export.executorch_pooled import PooledExportCache
from trimkv_edge.models.family import text_decoder
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.retention import RetentionGate, log_sigmoid

GATES = "gates"


def has_gates(model: GatedModel) -> bool:
    """Whether a program of this model has the method ``gates``."""
    return isinstance(model.gates[0], RetentionGate)


@contextmanager
def gates_apart(model: GatedModel) -> Iterator[None]:
    """Within, a layer gives its backend what its gate would read, float32 ``[1, T, hidden_size]``."""
    attentions = [layer.self_attn for layer in text_decoder(model.base).layers]
    gates = model.gates
    for attention in attentions:
        attention.retention_gate = nn.Identity()
    try:
        yield
    finally:
        for attention, gate in zip(attentions, gates, strict=True):
            attention.retention_gate = gate


class Gates(nn.Module):
    """``(slot int64 [1], x_0, ..., x_{layers - 1} float32 [1, T, hidden_size]) -> slot``: what gates say of T tokens.

    Args:
        model: whose gates; their weights keep the names that they have in it.
        cache: gets the log-betas.
    """

    def __init__(self, model: GatedModel, cache: ExportCache | PooledExportCache) -> None:
        super().__init__()
        self.model = _only_gates(model)
        self.cache = cache
        self._gates = model.gates

    def forward(self, slot: Tensor, *rows: Tensor) -> Tensor:
        logits = [gate.logit(x) for gate, x in zip(self._gates, rows, strict=True)]  # type: ignore[operator]
        self.cache.retain(slot, log_sigmoid(torch.cat(logits, dim=-1).float()))
        return slot + 0


def trace_gates(gates: Gates, hidden_size: int) -> ExportedProgram:
    """``torch.export`` for up to as many tokens as wait."""
    layers, most = gates.cache.layers, gates.cache.config.gate_rows
    count = min(most, 3)
    tokens = {1: Dim("T", min=1, max=most)} if count > 1 else None
    rows = [torch.zeros(1, count, hidden_size) for _ in range(layers)]
    number = torch.zeros(1, dtype=torch.int64)
    return export(gates, (number, *rows), dynamic_shapes=(None, (tokens,) * layers), strict=False)


def _only_gates(model: GatedModel) -> nn.Module:
    """Modules of the same names down to the gates, and nothing beside."""
    root = nn.Module()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RetentionGate):
            *above, own = path.split(".")
            owner = root
            for name in above:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(own, module)
    return root
