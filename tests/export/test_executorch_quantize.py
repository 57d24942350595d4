"""Quantised weights of the ExecuTorch target: rounding by hand, programs against the eager model of their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.pybindings import _C
from factories import gated_model, random_tokens
from onnx_artefact import make_manifest, spread_gates
from torch import nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export.executorch import PROGRAM, export_executorch, partitioners
from trimkv_edge.export.executorch_parts import PackedParts
from trimkv_edge.export.executorch_quantize import (
    Late,
    QuantizedLinear,
    Zeros,
    reference_model,
    round_activations,
    round_trip,
    round_weight,
)
from trimkv_edge.export.executorch_weights import LateWeights
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.verify import ParityReport, compare, stream_plan
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import hollow, model_weights
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=6)


@pytest.mark.parametrize(("bits", "width"), [(4, 32), (8, 96)])
def test_rounding_is_to_the_nearest_step_of_its_group(bits: int, width: int) -> None:
    weight = np.random.default_rng(bits).standard_normal((5, 96)).astype(np.float32)
    codes, scale = (part.numpy() for part in round_weight(torch.from_numpy(weight), bits))
    assert scale.shape == (5, 96 // width)
    top = 2 ** (bits - 1)
    for row in range(5):
        for group in range(96 // width):
            part = slice(group * width, (group + 1) * width)
            step = scale[row, group]
            # 15 or 255 steps across the largest magnitude on both sides; bfloat16 keeps 8 bits of a scale.
            assert step == pytest.approx(np.abs(weight[row, part]).max() * 2 / (2 * top - 1), rel=2**-8)
            want = np.clip(np.rint(weight[row, part] / step), -top, top - 1)
            sure = np.abs(weight[row, part] / step % 1 - 0.5) > 1e-4
            np.testing.assert_array_equal(codes[row, part][sure], want[sure])
    if bits == 4:
        assert not (scale.view(np.uint32) & 0xFFFF).any(), "XNNPACK cuts these scales to bfloat16"
    wide = np.repeat(scale, width, axis=1)
    np.testing.assert_array_equal(round_trip(torch.from_numpy(weight), bits).numpy(), codes * wide)


def test_rows_are_rounded_in_blocks_as_one() -> None:
    weight = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    whole, tail = round_weight(weight, 4), round_weight(weight[4090:], 4)
    assert torch.equal(whole.codes[4090:], tail.codes)
    assert torch.equal(whole.scale[4090:], tail.scale)


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="groups of 32, which do not divide a width of 40: use --quant int8"):
        round_weight(torch.zeros(2, 40), 4)


class _Layer(nn.Module):
    def __init__(self, weight: torch.Tensor, bits: int, bias: torch.Tensor) -> None:
        super().__init__()
        self.linear = QuantizedLinear(nn.Linear(*reversed(weight.shape)), bits, bias, Zeros())
        self.linear.codes, self.linear.scale = round_weight(weight, bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_xnnpack_computes_what_the_reference_says(bits: int) -> None:
    """In float64: activations and weights rounded as said; tokens of all sizes, one all 0, one all positive."""
    generator = torch.Generator().manual_seed(bits)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((48, 128), (48,), (1, 24, 128)))
    x *= torch.logspace(-3, 3, 24).view(1, -1, 1)
    x[0, 3], x[0, 4] = 0, x[0, 4].abs()
    exported = torch.export.export(_Layer(weight, bits, bias), (x,))
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    program = to_edge_transform_and_lower(exported, partitioner=partitioners("xnnpack"), compile_config=config)
    left = [str(node.target) for node in program.exported_program().graph.nodes if node.op == "call_function"]
    assert not [name for name in left if "linear" in name or "affine" in name]
    content = program.to_executorch().buffer  # the program lies in it
    loaded = _C._load_program_from_buffer(content)
    got = loaded.load_method("forward").call((x,))[0].double()
    inputs = (round_activations(x) if bits == 4 else x).double()
    want = nn.functional.linear(inputs, round_trip(weight, bits).double(), bias.double())
    scale = x.abs().amax(-1, keepdim=True).double() + 1
    assert ((got - want).abs() / scale).max() <= 2e-5
    plain = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert ((got - plain).abs() / scale).max() > 1e-3, "nothing was rounded"


@dataclass
class Quantized:
    """An artefact made from a hollow copy with late weights, and the model whose numbers they are."""

    scheme: str
    folder: Path
    model: GatedModel
    engine: ExecuTorchEngine

    def parity(self, reference: GatedModel) -> ParityReport:
        plan = stream_plan(CONFIG.budget, CONFIG.buffer, CONFIG.prefill_chunk, events=8)
        tokens = random_tokens(sum(plan))
        return compare(EagerEngine(reference, CONFIG), self.engine, tokens, plan, 2e-5, close_abs=2e-5)


@pytest.fixture(scope="module", params=["int8", "8da4w"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    # rg10 gates share a layer, and qwen3 has norms of its own; phi3 has fused projections.
    family, gates = {"int8": ("qwen3-gqa", "rg10"), "8da4w": ("phi3-mha", "rg")}[request.param]
    model = spread_gates(gated_model(family, gates))
    empty = gated_model(family, gates, seed=5)
    hollow(empty)
    folder = tmp_path_factory.mktemp("quantized")
    target = export_executorch(empty, CONFIG, folder, scheme=SCHEMES[request.param], weights=model_weights(model))
    return Quantized(
        request.param, folder, model, ExecuTorchEngine(folder, make_manifest(model, CONFIG, target), target, 1)
    )


def test_program_agrees_with_the_reference(quantized: Quantized) -> None:
    reference = reference_model(quantized.model, model_weights(quantized.model), SCHEMES[quantized.scheme])
    report = quantized.parity(reference)
    assert report.events == 8
    if quantized.scheme == "int8":  # float32 activations: nothing but float noise
        assert report.max_logit_diff <= 1e-4
        assert (report.survivor_mismatches, report.greedy_mismatches) == (0, 0)
    else:  # float noise moves some activations over a rounding step; without that, calls agree to float noise
        assert report.close is not None
        assert report.close >= 0.7 * report.steps
        assert report.max_logit_diff <= 0.3
        assert report.survivor_mismatches <= 0.002 * report.survivors
        assert report.greedy_mismatches <= report.steps - report.close
    far = quantized.parity(quantized.model)
    assert far.max_logit_diff > 10 * report.max_logit_diff, "the weights were not rounded"


def test_nothing_but_the_program_is_left(quantized: Quantized) -> None:
    assert [path.name for path in quantized.folder.iterdir()] == [PROGRAM]


def test_bytes_and_kernels(quantized: Quantized) -> None:
    content = (quantized.folder / PROGRAM).read_bytes()
    gates = {id(part) for gate in quantized.model.gates for part in gate.modules()}
    most = int.from_bytes(content[16:24], "little") + 20_000  # the methods' code (from the header), norms, biases
    for module in quantized.model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):  # and 4 KiB for XNNPACK's graph around each, and padding
            four = quantized.scheme == "8da4w" and isinstance(module, nn.Linear) and id(module) not in gates
            most += module.weight.numel() * (4.5 if four else 8) / 8 + 4 * module.weight.shape[0] + 4096
    floats = 4 * sum(parameter.numel() for parameter in quantized.model.parameters())
    assert len(content) < most < floats
    plans = {plan.name: plan for plan in deserialize_pte_binary(content).program.execution_plan}
    found = {name for op in plans["forward"].operators for name in [op.name] if "quant" in name or "mm" in name}
    assert found == {"quantized_decomposed::embedding_byte"}
    assert b".py" not in content


def test_wrong_schemes_are_refused(tmp_path: Path) -> None:
    model = gated_model("phi3-mha")
    with pytest.raises(ConfigError, match=r"no kernels for int4 weights on CPUs: use --quant 8da4w .*--target onnx"):
        export_executorch(model, CONFIG, tmp_path, scheme=SCHEMES["int4"])
    with pytest.raises(ConfigError, match="portable kernels have no int8 weights: use --ops xnnpack or --quant none"):
        export_executorch(model, CONFIG, tmp_path, ops="portable", scheme=SCHEMES["int8"])
    assert not list(tmp_path.iterdir())


def test_a_layer_that_never_got_its_weights_is_an_error() -> None:
    model = nn.Module()
    model.add_module("used", nn.Linear(2, 2))
    model.add_module("same", model.used)
    model.add_module("lost", nn.Linear(2, 2))
    late = LateWeights({name: Late(dict) for name in ("used", "same", "lost")}, "model", PackedParts())
    late._used.add("model.used")
    with pytest.raises(VerificationError, match=r"lacks the weights of model\.lost"):
        late.check_used(model)
    del late._late["model.lost"]
    late.check_used(model)
