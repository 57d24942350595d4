"""``8a8w`` in torch, before CoreML sees it: which layers are rounded, by what, and how far the results move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backend_artefact import need
from factories import gated_model, random_tokens
from onnx_artefact import spread_gates
from torch.export import ExportedProgram
from torch.fx import Node

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.coreml_quantize import quantized
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.onnx_gates import deferred_sigmoid

need("npu:coreml")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
COUNTS = {"decode": 1, "prefill": 8}
# q, k and v read the same input, and so do gate and up: four of each of two layers, and the output layer's.
INPUTS = 2 * 4 + 1


@pytest.fixture(scope="module")
def module() -> HostEvicted:
    return HostEvicted(spread_gates(gated_model("llama-gqa")))


@pytest.fixture(scope="module")
def programs(module: HostEvicted) -> dict[str, ExportedProgram]:
    return quantized(module, CONFIG, COUNTS, random_tokens(32 + 3 * 8))


def rounded_inputs(program: ExportedProgram) -> list[tuple[float, int, int, int]]:
    """(scale, zero point, lowest, highest) of each rounded input."""
    return [node.args[1:5] for node in program.graph.nodes if "quantize_per_tensor" in called(node, "quantize")]


def called(node: Node, start: str) -> str:
    name = str(node.target).removeprefix("quantized_decomposed.")
    return name if node.op == "call_function" and name.startswith(start) else ""


def test_both_graphs_round_the_same_inputs_by_the_same_scales(programs: dict[str, ExportedProgram]) -> None:
    decode, prefill = (rounded_inputs(programs[name]) for name in COUNTS)
    assert decode == prefill
    assert len(decode) == INPUTS
    assert {entry[1:] for entry in decode} == {(0, -127, 127)}
    assert len({entry[0] for entry in decode}) > INPUTS // 2


def test_weights_have_a_scale_for_each_output_channel(
    module: HostEvicted, programs: dict[str, ExportedProgram]
) -> None:
    floats = {name: value for name, value in module.named_parameters() if ("proj" in name or "lm_head" in name)}
    stored = {name: value for name, value in programs["decode"].state_dict.items() if value.dtype == torch.int8}
    stored |= {name: value for name, value in programs["decode"].constants.items() if value.dtype == torch.int8}
    assert sorted(map(list, (value.shape for value in stored.values()))) == sorted(
        list(value.shape) for value in floats.values()
    )
    for value in floats.values():
        scale = value.detach().abs().amax(dim=1, keepdim=True) / 127
        want = (value.detach() / scale).round().clamp(-127, 127).to(torch.int8)
        assert any(torch.equal(want, found) for found in stored.values() if found.shape == want.shape)


@pytest.mark.parametrize("name", COUNTS)
def test_results_are_near_those_of_the_float_graph(
    module: HostEvicted, programs: dict[str, ExportedProgram], name: str
) -> None:
    count, rng = COUNTS[name], np.random.default_rng(3)
    table = module.model.base.model.embed_tokens.weight.detach()
    hidden = table[torch.tensor(random_tokens(count))][None]
    angles = torch.from_numpy(rng.uniform(0, 6, (1, count, 16))).float()
    mask = torch.zeros(1, 1, count, 32 + count)
    past = [torch.from_numpy(rng.standard_normal((1, 2, 32, 16))).float() for _ in range(4)]
    with torch.no_grad(), deferred_sigmoid(module.model):
        want = module(hidden, angles.cos(), angles.sin(), mask, past)
    got = programs[name].module()(hidden, angles.cos(), angles.sin(), mask, past)
    for exact, found in zip(want, got, strict=True):
        assert torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0) > 0.995
    assert not torch.equal(want[0], got[0])
