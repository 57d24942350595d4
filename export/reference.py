"""The eager model that an artefact is compared with: the same numbers as the artefact stores, in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import module_bits, parameter_bits
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, parameter_slots

_ROWS = 4096
Module = TypeVar("Module", bound=nn.Module)
# A weight, its bits, the scheme's dtype -> what it is after rounding; 16 bits may be of any tensor, fewer of a matrix.
# Rows are rounded each for itself.
Rounding = Callable[[Tensor, int, str], Tensor]


class ReferenceWeights:
    """Fills a model, or a part of it, with the values that a scheme's weights stand for.

    Args:
        model: hollow or not.
        weights: its float32 values by parameter name.
        scheme: of the artefact.
        rounding: of the artefact's target.
    """

    def __init__(self, model: GatedModel, weights: Weights, scheme: Scheme, rounding: Rounding) -> None:
        self.model = model
        self._weights, self._rounding = weights, rounding
        self._floats, self._dtype = scheme.float_bits, scheme.dtype
        self._names = {id(getattr(owner, own)): name for name, owner, own in parameter_slots(model)}
        self._bits = module_bits(model, scheme)

    def fill(self, part: Module) -> Module:
        """A copy of ``part`` (of ``model``) with all its values in memory."""
        plain: dict[int, nn.Parameter] = {}
        rounded: dict[int, nn.Module] = {}
        for module in part.modules():
            bits = self._bits.get(id(module), 32)
            for own, parameter in module.named_parameters(recurse=False):
                kept = parameter_bits(bits, own, self._floats)
                if kept < 32:
                    # Per module: an output layer may be tied to an embedding of other bits.
                    if id(module) not in rounded:
                        rounded[id(module)] = copy.copy(module)
                        rounded[id(module)]._parameters = dict(module._parameters)
                    rounded[id(module)]._parameters[own] = self._rounded(parameter, kept)
                elif id(parameter) not in plain:
                    plain[id(parameter)] = nn.Parameter(self._value(parameter), requires_grad=False)
        for module in rounded.values():
            for own, held in module._parameters.items():
                module._parameters[own] = plain.get(id(held), held)
        return copy.deepcopy(part, {**rounded, **plain})

    @torch.no_grad()
    def _rounded(self, parameter: Tensor, bits: int) -> nn.Parameter:
        """In place: copies of an output layer would be the most that an export ever holds."""
        value = self._value(parameter)
        for rows in value.split(_ROWS):
            rows.copy_(self._rounding(rows, bits, self._dtype))
        return nn.Parameter(value, requires_grad=False)

    def _value(self, parameter: Tensor) -> Tensor:
        return self._weights(self._names[id(parameter)])


def exact(weight: Tensor, bits: int, dtype: str) -> Tensor:
    """Rounding of schemes that have none."""
    return weight
