"""Reference weights are rounded a few rows at a time, in memory of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factories import gated_model
from torch import Tensor

from trimkv_edge.export import reference
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.models.skeleton import model_weights

ROWS = 5


@pytest.mark.parametrize(("target", "scheme"), [("executorch", "8da4w"), ("onnx", "int4"), ("onnx", "bf16")])
def test_pieces_are_rounded_as_the_whole_is(target: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROWS", ROWS)
    model, rounding, seen = gated_model("qwen3-gqa"), TARGETS[target].rounding, []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def watched(weight: Tensor, bits: int, dtype: str) -> Tensor:
        seen.append(len(weight))
        return rounding(weight, bits, dtype)

    chosen = replace(SCHEMES[scheme], embedding_bits=32)
    filled = ReferenceWeights(model, model_weights(model), chosen, watched).fill(model)
    assert max(seen) == ROWS
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    layer = "base.model.layers.0.mlp.down_proj.weight"
    want = rounding(before[layer].float(), chosen.weight_bits, chosen.dtype)
    assert torch.equal(filled.get_parameter(layer), want)
    assert not torch.equal(filled.get_parameter(layer), before[layer])
