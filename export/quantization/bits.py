"""Which module of a model is stored in how many bits, and how many bytes that makes."""

from __future__ import annotations

import torch
from torch import nn

from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.models.family import vision_encoder
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape
from trimkv_edge.models.source import ModelSource
from trimkv_edge.retention import NoGate, build_gates

_SCALED = 32  # weights that share a scale


def module_bits(model: GatedModel, scheme: Scheme) -> dict[int, int]:
    """Bits of every module that has something to round, by the module's ``id``; see :func:`parameter_bits`. Vision
    encoders keep float32: each picture passes them once, and all that is read of it follows from that."""
    gates = {id(part) for gate in model.gates for part in gate.modules()}
    encoder = vision_encoder(model.base)
    exact = set() if encoder is None else set(map(id, encoder.modules()))
    bits = {}
    for module in model.modules():
        if id(module) in exact:
            continue
        if isinstance(module, nn.Embedding):
            bits[id(module)] = scheme.embedding_bits
        elif isinstance(module, nn.Linear):
            bits[id(module)] = scheme.gate_bits if id(module) in gates else scheme.weight_bits
        elif scheme.float_bits == 16 and id(module) not in gates:
            bits[id(module)] = 16
    return bits


def parameter_bits(bits: int, name: str, rest: int = 32) -> int:
    """Bits of a module's own parameter: integers stand for its ``weight`` alone, float16 for all it has.

    Args:
        rest: of what a module with integers has beside them.
    """
    if name == "weight" or bits == 16:
        return bits
    return rest if bits < 16 else 32


def stored_bytes(model: GatedModel, scheme: Scheme) -> int:
    """Bytes of all weights in an artefact; what is packed is packed for each module, tied to another or not."""
    bits, seen, total = module_bits(model, scheme), set(), 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = parameter_bits(bits.get(id(module), 32), name, scheme.float_bits)
            held = (id(module if kind <= 8 else parameter), kind)
            if held not in seen:
                seen.add(held)
                total += _packed(parameter, kind, scheme.float_bits // 8)
    return total


def gate_parameters(model: GatedModel) -> int:
    """Parameters of all gates; what ``rg10`` shares counts for each layer."""
    return sum(parameter.numel() for gate in model.gates for parameter in gate.parameters())


def _packed(parameter: torch.Tensor, bits: int, scale: int) -> int:
    """Bytes of a parameter; ``scale``: of one scale."""
    if bits >= 16:
        return parameter.numel() * bits // 8
    rows, width = parameter.shape
    blocks = -(-width // _SCALED)
    return int(rows * blocks * (_SCALED * bits // 8 + scale))


def gated_outline(source: ModelSource, kind: str) -> GatedModel:
    """The model of ``source`` with gates of the family's width, all on torch's meta device: sizes without memory."""
    base, shape = source.outline(), GateShape.of(source.config)
    width = min(source.family.gate_intermediate_size, shape.hidden_size)
    with torch.device("meta"):
        gates = (
            nn.ModuleList(NoGate(shape.num_kv_heads) for _ in range(shape.num_layers))
            if kind == "none"
            else build_gates(kind, shape.num_layers, shape.hidden_size, shape.num_kv_heads, width, shape.act)
        )
    return GatedModel(base, gates)
