"""Gates that a graph of their own runs, over many tokens at once: only events and saved states need log-betas.

Inside a step gates would read their weights from memory for every token. So a step gives what they read, and a runtime
keeps that until they are due (:class:`~trimkv_edge.runtime.engines.gate_rows.GateRows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from trimkv_edge.models.family import text_decoder
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.retention import RetentionGate


def has_gates(model: GatedModel) -> bool:
    """Whether a policy reads what the model's gates say."""
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
