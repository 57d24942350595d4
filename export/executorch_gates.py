"""The gates of an ExecuTorch program: a method of their own, which reads many tokens at once (see
:mod:`trimkv_edge.export.gates_apart`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from trimkv_edge.export.executorch_cache import ExportCache
from trimkv_edge.export.executorch_pooled import PooledExportCache
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.retention import RetentionGate, log_sigmoid

GATES = "gates"


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
