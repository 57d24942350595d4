"""Gates of a decoder: one log-sigmoid for all layers, and a graph of their own where they may read later.

``gates.onnx`` reads what each layer's gate reads of T <= ``CacheConfig.gate_rows`` tokens that the decoder has read,
and writes their log-betas (see :mod:`trimkv_edge.export.gates_apart`).

==================== ======================================= ==========================================================
``gate_input.{i}``   float32 ``[1, T, hidden_size]``         output of the same name of the decoder, one token or more
``live_length``      int64 ``[1]``                           as the decoder got it with the first of these tokens
``lengths``          int64 ``[rows]``                        likewise; where heads share a budget
``log_beta``         float32                                 ``past`` and ``present``, in place
==================== ======================================= ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from onnx_ir import Model
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.gates_apart import has_gates
from trimkv_edge.export.onnx_trace import trace
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.retention import RetentionGate, log_sigmoid

Finish = Callable[[Tensor], Tensor]


@contextmanager
def deferred_sigmoid(model: GatedModel) -> Iterator[Finish]:
    """While open, the model's gates give their raw logits.

    Yields:
        what turns logits of any shape into log-betas, float32; it changes nothing where a model has no gates.
    """
    gates = [gate for gate in model.gates if isinstance(gate, RetentionGate)]
    for gate in gates:
        gate.forward = gate.logit  # type: ignore[method-assign]
    try:
        yield (lambda logits: log_sigmoid(logits.float())) if gates else (lambda log_betas: log_betas)
    finally:
        for gate in gates:
            del gate.forward


def may_wait(model: GatedModel, config: CacheConfig, ops: str) -> bool:
    """Whether the gates get a graph of their own: they are there, and the operators are those of CPUs.

    Plain operators run anywhere, and 16-bit keys and values on GPUs, where one graph is captured for a step.
    """
    return has_gates(model) and ops == "gqa" and config.kv_dtype not in ("float16", "bfloat16")


def write_log_betas(table: Tensor, numbers: list[Tensor], new: Tensor) -> Tensor:
    """The table with the log-betas of a chunk.

    Args:
        table: ``[slots, rows]``, or ``[rows, slots]`` where heads share a budget.
        numbers: int64 ``live_length [1]``; where heads share a budget, also ``lengths [rows]``.
        new: ``[T, rows]``.
    """
    slots = numbers[0] + torch.arange(new.shape[0], dtype=torch.int64)
    if len(numbers) == 1:
        where = slots[:, None]
    else:
        rows, count = table.shape[0], new.shape[0]
        slot = numbers[1].unsqueeze(1) + slots
        row = torch.arange(rows, dtype=torch.int64).unsqueeze(1).expand(rows, count)
        where, new = torch.stack([row, slot], dim=-1), new.transpose(0, 1)
    return onnx_ops.symbolic("ScatterND", (table, where, new), dtype=table.dtype, shape=table.shape, version=18)


class Gates(nn.Module):
    """The gates of all layers as a function of rows and the table of log-betas, for tracing."""

    def __init__(self, model: GatedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: list[Tensor], numbers: list[Tensor], log_beta: Tensor) -> Tensor:
        with deferred_sigmoid(self.model) as finish:
            logits = [gate(x) for gate, x in zip(self.model.gates, rows, strict=True)]
        return write_log_betas(log_beta, numbers, finish(torch.cat(logits, dim=-1)[0]))


def trace_gates(gates: Gates, config: CacheConfig, numbers: dict[str, Tensor], table: Tensor, opset: int) -> Model:
    """The graph, its large weights not yet in it.

    Args:
        gates: of a model prepared for tracing.
        numbers, table: examples of what :func:`write_log_betas` takes.
    """
    shape = gates.model.config
    layers, size = shape.num_hidden_layers, min(config.gate_rows, 3)
    tokens = torch.export.Dim("T", min=1, max=config.gate_rows) if size > 1 else None
    rows = [torch.zeros(1, size, shape.hidden_size) for _ in range(layers)]
    dynamic: dict[str, Any] = {
        "rows": [{1: tokens} if tokens else None] * layers,
        "numbers": [None] * len(numbers),
        "log_beta": None,
    }
    names = [*(f"gate_input.{layer}" for layer in range(layers)), *numbers, "past.log_beta"]
    args = (rows, list(numbers.values()), table)
    return trace(gates, args, names, ["present.log_beta"], opset, dynamic).model
