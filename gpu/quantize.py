"""Integer weights on the device through torchao: those of the linear layers, the output layer included.

Token embedding and gates stay as they are. The names are those of ``--quant``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.models.gated import GatedModel

SCHEMES = ("none", "int8", "int4")
_GROUP = 32  # weights that share a 4-bit scale


def quantize(model: GatedModel, scheme: str) -> GatedModel:
    """Rounds the weights of ``model`` in place, layer by layer, and returns it; arithmetic stays in the model's dtype.

    Args:
        model: on its device, see :func:`~trimkv_edge.gpu.placement.moved`.
        scheme: ``none``; ``int8``: one scale for each output channel; ``int4``: groups of 32 input channels with a
            scale each. Packed for tinygemm's kernel on CUDA, which takes bfloat16; elsewhere a byte holds each.

    Raises:
        ConfigError: unknown, or ``int4`` of a model on CUDA that is not bfloat16, or of layers no multiple of 32 wide.
        TrimKVError: torchao is not installed.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"the torch engine does not round weights to {scheme!r}: use one of {', '.join(SCHEMES)}")
    if scheme == "none":
        return model
    gates = {id(part) for gate in model.gates for part in gate.modules()}
    linear = {id(part): part for part in model.modules() if isinstance(part, nn.Linear) and id(part) not in gates}
    if scheme == "int4":
        odd = sorted({part.in_features for part in linear.values() if part.in_features % _GROUP})
        if odd:
            raise ConfigError(f"int4 weights come in groups of {_GROUP}, but a layer is {odd[0]} wide: use int8")
    config = _config(scheme, next(iter(linear.values())).weight)
    _torchao(scheme).quantize_(model, config, filter_fn=lambda module, name: id(module) in linear)
    return model


def _config(scheme: str, weight: torch.Tensor) -> Any:
    made = _torchao(scheme)
    # torchao would set inductor's options for the whole process.
    if scheme == "int8":
        return made.Int8WeightOnlyConfig(set_inductor_config=False)
    if not weight.is_cuda:
        four = torch.int4  # type: ignore[attr-defined]
        return made.IntxWeightOnlyConfig(weight_dtype=four, granularity=made.PerGroup(_GROUP))
    if weight.dtype is not torch.bfloat16:
        raise ConfigError(f"int4 weights on CUDA compute in bfloat16, not {weight.dtype}: use bfloat16 or int8")
    return made.Int4WeightOnlyConfig(
        group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def _torchao(scheme: str) -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise TrimKVError(f"{scheme} weights need torchao ({error}): pip install 'trimkv-edge[torch]'") from error
    return quantization
