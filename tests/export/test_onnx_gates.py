"""Gates that give logits while a graph is traced, and one log-sigmoid for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import gated_model
from onnx_artefact import make_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx_gates import deferred_sigmoid


@pytest.mark.parametrize("gate", ["rg", "rg10"])
def test_logits_inside_and_log_betas_again_outside(gate: str) -> None:
    model = gated_model("llama-gqa", gate)
    x = torch.randn(1, 3, model.config.hidden_size)
    before = model.gates[0](x)
    with deferred_sigmoid(model) as finish:
        raw = model.gates[0](x)
        log_beta = finish(raw)
    want = -np.logaddexp(0, -raw.detach().double().numpy())
    np.testing.assert_allclose(log_beta.detach().numpy(), want, rtol=1e-6)
    np.testing.assert_array_equal(model.gates[0](x).detach(), before.detach())
    assert not np.allclose(raw.detach(), before.detach())


@pytest.mark.parametrize("ops", ["gqa", "standard"])
def test_betas_near_one_keep_their_digits_in_the_graph(ops: str, tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    for gate in model.gates:
        for parameter in gate.parameters():
            parameter.data.zero_()
    model.gates[0].bias.data = torch.tensor([8.0, 18.0])
    model.gates[1].bias.data = torch.tensor([-30.0, 60.0])
    engine = make_artefact(tmp_path, model, CacheConfig(budget=8, buffer=4, prefill_chunk=4), ops).onnx()
    engine.prefill([5, 6])
    want = -np.logaddexp(0, -np.array([[8.0, 18.0], [-30.0, 60.0]]))
    np.testing.assert_allclose(engine.state().log_beta[:, :, 1], want, rtol=1e-5)


def test_without_gates_nothing_changes() -> None:
    model = gated_model("llama-gqa")
    for layer in model.base.model.layers:
        layer.self_attn.retention_gate = torch.nn.Identity()
    with deferred_sigmoid(model) as finish:
        x = torch.ones(2)
        assert finish(x) is x
