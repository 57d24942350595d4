"""Embeddings of 4 bits: the operators of both targets against tables made by hand, and the option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import _C
from factories import gated_model, random_tokens
from onnx_artefact import feed, make_manifest

from trimkv_edge.cli.export import build_parser
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.executorch_quantize import Codes, QuantizedEmbedding
from trimkv_edge.export.onnx import export_onnx, with_float_activations
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.export.quantization import SCHEMES, find_scheme
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.runtime.engines.executorch import _import_executorch
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_executorch_reads_rows_as_they_were_rounded(bits: int, group: int) -> None:
    generator = np.random.default_rng(bits)
    levels = 2 ** (bits - 1)
    codes = generator.integers(-levels, levels, (20, 64)).astype(np.int8)
    codes[0, :4] = [-levels, levels - 1, 0, -1]
    scale = generator.uniform(0.5, 2, (20, 64 // group)).astype(np.float32)
    table = QuantizedEmbedding(Codes(torch.from_numpy(codes), torch.from_numpy(scale)), bits)
    ids = torch.tensor([[0, 19, 7, 0]])
    program = to_edge_transform_and_lower(torch.export.export(table, (ids,))).to_executorch()
    _import_executorch(kernels=True)
    got = _C._load_program_from_buffer(program.buffer).load_method("forward").call((ids,))[0]
    want = codes.astype(np.float32) * scale.repeat(group, 1)
    np.testing.assert_array_equal(got.numpy(), want[ids.numpy()])
    assert table.codes.numel() == 20 * 64 * bits // 8


def test_an_onnx_graph_with_four_bits_computes_what_its_numbers_mean(tmp_path: Path) -> None:
    scheme = find_scheme("int8", ("onnx",), 4)
    model = gated_model("llama-gqa")
    target = export_onnx(model, CONFIG, tmp_path, scheme=scheme)
    (lookup,) = [
        node
        for node in onnx.load(tmp_path / "decoder.onnx").graph.node
        if node.op_type.startswith("Gather") and node.domain == "com.microsoft"
    ]
    assert {attribute.name: attribute.i for attribute in lookup.attribute}["bits"] == 4
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    exact = with_float_activations(tmp_path, target, scratch)
    engine = OnnxEngine(tmp_path, make_manifest(model, CONFIG, exact), exact, threads=1)
    tokens = random_tokens(75, seed=3)

    def eager(bits: int) -> list[np.ndarray]:  # type: ignore[type-arg]
        chosen = replace(SCHEMES["int8"], embedding_bits=bits)
        weights = ReferenceWeights(model, model_weights(model), chosen, TARGETS["onnx"].rounding)
        return feed(EagerEngine(weights.fill(model), CONFIG), tokens, [8, 3, 1])

    got = feed(engine, tokens, [8, 3, 1])
    np.testing.assert_allclose(np.stack(eager(4)), np.stack(got), atol=1e-3)
    assert np.abs(np.stack(eager(8)) - np.stack(got)).max() > 0.1


def request(output: Path, *options: str) -> ExportRequest:
    from trimkv_edge.cli.export import _request

    return _request(build_parser().parse_args(["--model", "tiny", "-o", str(output), "--budget", "256", *options]))


def test_the_option_reaches_the_plan_and_its_sizes(tmp_path: Path) -> None:
    plans = [
        plan_export(request(tmp_path / "o", "--quant", "8da4w", *more)) for more in ((), ("--embedding-bits", "4"))
    ]
    assert [plan.scheme.embedding_bits for plan in plans] == [8, 4]
    embedding = plans[0].outline.base.model.embed_tokens.weight
    saved = plans[0].memory.weights - plans[1].memory.weights
    # tiny's output layer is the embedding; each is packed for itself.
    assert saved == embedding.numel() // 2


def test_the_manifest_and_the_card_have_the_bits(tmp_path: Path) -> None:
    options = ("--quant", "int4", "--embedding-bits", "4", "--target", "onnx", "--buffer", "16")
    plan = plan_export(replace(request(tmp_path / "o", *options), budget="16"))
    made = run_export(plan, lambda line: None)
    assert (made.quantization, made.embedding_bits) == ("int4", 4)
    assert load_manifest(tmp_path / "o").embedding_bits == 4
    assert "| quantisation | int4, embedding in 4 bits |" in (tmp_path / "o" / "README.md").read_text()
    report = made.targets["onnx"].parity
    assert (report["survivor_mismatches"], report["greedy_mismatches"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--embedding-bits", "4"), "none does not round the embedding: .*use --quant int8, int4, 8da4w"),
        (("--quant", "fp16", "--target", "onnx", "--embedding-bits", "8"), "fp16 does not round the embedding"),
        (("--quant", "int8", "--embedding-bits", "2"), "cannot have 2 bits: use --embedding-bits 4 or 8"),
    ],
)
def test_bits_that_cannot_be_had(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_export(request(tmp_path / "out", *options))
