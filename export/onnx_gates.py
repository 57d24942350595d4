"""One log-sigmoid for the gates of all layers instead of five small operators in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

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
