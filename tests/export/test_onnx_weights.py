"""Weights of the ONNX target: rounding by hand, packing as the operators read it, and graphs filled from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import gated_model, random_tokens
from onnx_artefact import feed, make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export import onnx_weights
from trimkv_edge.export.onnx import export_onnx, with_float_activations
from trimkv_edge.export.onnx_weights import BLOCK, quantize, round_trip
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import hollow, model_weights
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_to_the_nearest_step_of_its_block(bits: int) -> None:
    weight = np.random.default_rng(bits).standard_normal((5, 80)).astype(np.float32)
    rounded = round_trip(torch.from_numpy(weight), bits).numpy()
    levels = 2 ** (bits - 1)
    for row in range(5):
        for start in range(0, 80, BLOCK):
            block, got = weight[row, start : start + BLOCK], rounded[row, start : start + BLOCK]
            # Symmetric, with the block's extreme at the end that has one level more.
            scale = block[np.abs(block).argmax()] / -levels
            want = np.clip(np.rint(block / scale), -levels, levels - 1) * scale
            near = np.abs(block / scale - np.floor(block / scale) - 0.5) < 1e-4  # a tie may go either way
            np.testing.assert_allclose(got[~near], want[~near], rtol=1e-5, atol=1e-7)
            assert np.abs(got - block).max() <= abs(scale) * 1.0001


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_by_themselves(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are in memory together."""
    weight = np.random.default_rng(bits).standard_normal((7, 70)).astype(np.float32)
    whole, rounded = quantize(weight, bits), round_trip(torch.from_numpy(weight), bits)
    monkeypatch.setattr(onnx_weights, "_ROWS", 3)
    for one, other in zip(whole, quantize(weight, bits), strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(rounded, round_trip(torch.from_numpy(weight), bits))


def test_packed_bytes_are_two_numbers_each() -> None:
    weight = np.zeros((1, BLOCK), np.float32)
    weight[0, :4] = [-8, 7, 1, -2]
    packed, scales = quantize(weight, 4)
    assert scales.shape == (1, 1)
    assert abs(scales[0, 0]) == 1.0
    sign = int(np.sign(scales[0, 0]))
    assert packed[0, 0, 0] == (8 - 8 * sign) | (8 + 7 * sign) << 4
    assert packed[0, 0, 1] == (8 + sign) | (8 - 2 * sign) << 4
    assert set(packed[0, 0, 2:]) == {8 | 8 << 4}


def quantized(kind: str, scheme: str, folder: Path, config: CacheConfig = CONFIG) -> tuple[GatedModel, OnnxEngine]:
    """An artefact made from a hollow copy, opened with float32 activations, and the eager model of its numbers."""
    real = gated_model(kind)
    empty = gated_model(kind, seed=5)
    hollow(empty)
    target = export_onnx(empty, config, folder, scheme=SCHEMES[scheme], weights=model_weights(real))
    scratch = folder / "scratch"
    scratch.mkdir()
    exact = with_float_activations(folder, target, scratch)
    manifest = replace(make_manifest(real, config, exact), quantization=scheme)
    from trimkv_edge.export.targets import TARGETS

    weights = ReferenceWeights(real, model_weights(real), SCHEMES[scheme], TARGETS["onnx"].rounding)
    return weights.fill(real), OnnxEngine(folder, manifest, exact, threads=1)


@pytest.mark.parametrize(
    ("kind", "scheme"), [("qwen3-gqa", "int4"), ("phi3-mha", "int8"), ("llama-gqa", "8da4w"), ("phi3-mha", "none")]
)
def test_a_graph_filled_from_files_computes_what_its_numbers_mean(kind: str, scheme: str, tmp_path: Path) -> None:
    model, engine = quantized(kind, scheme, tmp_path)
    eager = EagerEngine(model, CONFIG)
    tokens = random_tokens(75, seed=3)
    want, got = feed(eager, tokens, [8, 3, 1]), feed(engine, tokens, [8, 3, 1])
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * max(1.0, float(np.abs(one).max())))
        assert one.argmax() == other.argmax()
    np.testing.assert_array_equal(eager.survivors(), engine.survivors())
    plain = EagerEngine(gated_model(kind), CONFIG)
    difference = max(np.abs(a - b).max() for a, b in zip(feed(plain, tokens, [8, 3, 1]), want, strict=True))
    assert (difference > 1e-3) == (scheme != "none")


def test_four_bits_take_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    export_onnx(gated_model("phi3-mha"), CONFIG, tmp_path / "full")
    export_onnx(gated_model("phi3-mha"), CONFIG, tmp_path / "four", scheme=SCHEMES["int4"])
    graph = onnx.load(tmp_path / "four" / "decoder.onnx").graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    projection = held["model.base.model.layers.0.self_attn.qkv_proj.packed"]
    # 3 x 64 outputs, 64 inputs in blocks of 32, two to a byte.
    assert list(projection.dims) == [192, 2, 16]
    levels = {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert levels == {4}
    assert not any(node.op_type == "MatMul" for node in graph.node)


def test_plain_operators_have_no_packed_products(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"standard has no 4-bit matrix product: use gqa, or --quant none"):
        export_onnx(gated_model("phi3-mha"), CONFIG, tmp_path, ops="standard", scheme=SCHEMES["int4"])
    assert list(tmp_path.iterdir()) == []
