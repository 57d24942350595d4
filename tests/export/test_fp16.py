"""float16 artefacts end to end: what is stored, what is computed, what verification accepts and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_request import request_for
from factories import base_config, gated_model, random_tokens
from faulty_onnx import KeepsTheNewest, ReadsAhead
from onnx import TensorProto
from onnx_artefact import Artefact, feed, make_manifest, same, spread_gates

from trimkv_edge.budget import held_as_float32
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, ModelError, VerificationError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.verify import check, compare, load_tolerance, stream_plan
from trimkv_edge.manifest import ByteInfo, Manifest, load_manifest
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import hollow, model_weights
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8, kv_dtype="float16")
FP16 = SCHEMES["fp16"]
PLAN = stream_plan(24, 8, 8, events=8, singles=5)


def rounded(model: GatedModel) -> GatedModel:
    """The oracle: every number of the file in float32, all of them float16 but the gates' last biases."""
    for name, parameter in model.named_parameters():
        if not name.endswith("retention_gate.bias"):
            parameter.data = parameter.data.half().float()
    return model


def exported(kind: str, folder: Path, gates: str = "rg") -> Artefact:
    """Made from a hollow copy, as large models are."""
    real, empty = (spread_gates(gated_model(kind, gates)) for _ in range(2))
    hollow(empty)
    target = export_onnx(empty, CONFIG, folder, scheme=FP16, weights=model_weights(real))
    manifest = replace(make_manifest(real, CONFIG, target), dtype="float16", quantization="fp16")
    return Artefact(folder, rounded(real), manifest, target)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return exported("qwen3-gqa", tmp_path_factory.mktemp("fp16"))


def test_the_graphs_hold_half_floats(artefact: Artefact) -> None:
    decoder, evict = (onnx.load(artefact.folder / name).graph for name in ("decoder.onnx", "evict.onnx"))
    for graph in (decoder, evict):
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        caches = {kind for name, kind in types.items() if name.endswith((".key", ".value"))}
        assert caches == {TensorProto.FLOAT16}
        assert types["past.log_beta"] == types["present.log_beta"] == TensorProto.FLOAT
    assert {value.name: value.type.tensor_type.elem_type for value in decoder.output}["logits"] == TensorProto.FLOAT
    # Rotary frequencies, 16 for a head of 32, and what is smaller: positions are multiplied before anything is rounded.
    assert max(np.prod(x.dims) for x in decoder.initializer if x.data_type == TensorProto.FLOAT) == 16
    # Norms compute in float32 inside; products, and what is between them, in float16.
    assert [node.op_type for node in decoder.node].count("GroupQueryAttention") == 2


@pytest.mark.parametrize("kind", ["qwen3-gqa", "phi3-longrope"])
def test_it_computes_what_its_numbers_mean(kind: str, artefact: Artefact, tmp_path: Path) -> None:
    made = artefact if kind == "qwen3-gqa" else exported(kind, tmp_path, "rg10")
    report = compare(made.eager(), made.onnx(), random_tokens(120, seed=3), PLAN, 2e-5, scripted=True)
    assert report.events == 8
    assert report.survivors == 8 * 4 * 24
    # float16 has 11 bits: its steps are 5e-4 of a number, and a few of them add up.
    assert report.max_logit_diff < 4e-3 * max(1.0, report.max_logit)
    assert report.max_logit_diff > 1e-5
    assert report.survivor_mismatches <= 0.01 * report.survivors
    assert report.greedy_mismatches <= 1  # random logits are nearly flat


def test_in_place_and_copying_engines_agree(artefact: Artefact) -> None:
    tokens = random_tokens(80, seed=5)
    one, other = artefact.onnx(), artefact.onnx(aliased=False)
    assert same(feed(one, tokens, [8, 3, 1]), feed(other, tokens, [8, 3, 1]))
    np.testing.assert_array_equal(one.survivors(), other.survivors())


def test_two_bytes_a_number(artefact: Artefact) -> None:
    large = [tensor.numel() for tensor in artefact.model.parameters() if tensor.numel() > 512]
    pages = 4096 * len(large)  # each begins at one
    assert 2 * sum(large) <= (artefact.folder / "decoder.onnx.data").stat().st_size <= 2 * sum(large) + pages
    engine = artefact.onnx()
    assert {engine._arrays[f"{layer}.{kind}"].nbytes for layer in range(2) for kind in ("key", "value")} == {
        2 * 32 * 32 * 2  # heads, slots, width, bytes
    }


def test_states_move_between_engines_up_to_float16(artefact: Artefact) -> None:
    eager, engine = artefact.eager(), artefact.onnx()
    feed(eager, random_tokens(50, seed=4), [8])
    engine.load_state(eager.state())
    first, second = eager.state(), engine.state()
    for name in ("key", "value"):
        got = getattr(second, name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, getattr(first, name).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(first.log_beta, second.log_beta)
    np.testing.assert_array_equal(first.positions, second.positions)
    third = artefact.onnx()
    third.load_state(second)
    assert np.array_equal(engine.decode(7), third.decode(7))


def test_many_weights_are_turned_one_at_a_time_and_say_the_same(artefact: Artefact) -> None:
    large = replace(artefact.manifest, bytes=ByteInfo(0, 4 * 2**30, 0))
    assert held_as_float32("float16", 2**30)
    assert not held_as_float32("float16", large.bytes.weights)
    assert not held_as_float32("float32", 2**30)
    held, turned = artefact.onnx(), OnnxEngine(artefact.folder, large, artefact.target, 1)
    assert (held._narrow, turned._narrow) == (False, True)
    tokens = random_tokens(120, seed=6)
    for one, other in zip(*(feed(engine, tokens, [8, 1, 3]) for engine in (held, turned)), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-3)  # it rounds what layers hand on to float16, as a GPU does
    np.testing.assert_array_equal(held.survivors(), turned.survivors())


def test_a_manifest_of_another_dtype_is_refused(artefact: Artefact) -> None:
    other = replace(artefact.manifest, cache=replace(CONFIG, kv_dtype="float32"))
    with pytest.raises(ArtefactError, match=r"past.0.key .*\(float16\).* but the manifest means .*\(float\)"):
        OnnxEngine(artefact.folder, other, artefact.target)


def test_verification_still_finds_faults(artefact: Artefact) -> None:
    tolerance = load_tolerance("float16")
    tokens = random_tokens(120, seed=3)
    for faulty, fault in ((KeepsTheNewest, "survivors differ"), (ReadsAhead, "logits differ")):
        engine = faulty(artefact.folder, artefact.manifest, artefact.target, threads=1)
        report = compare(artefact.eager(), engine, tokens, PLAN, tolerance.score_rel, scripted=True)
        with pytest.raises(VerificationError, match=fault):
            check(report, tolerance, "the artefact")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("phi3-mha").save_pretrained(folder)
    return folder


def fp16_request(model: Path, output: Path, **more: Any) -> ExportRequest:
    return request_for(model, output, **{"targets": ("onnx",), "quant": "fp16", **more})


def test_the_whole_export_says_float16(model: Path, tmp_path: Path) -> None:
    run_export(plan_export(fp16_request(model, tmp_path / "out")), lambda line: None)
    manifest: Manifest = load_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.quantization, manifest.cache.kv_dtype) == ("float16", "fp16", "float16")
    # 24 slots x 8 rows x (2 x 16 x 2 + 4) bytes, and 16 positions x 8 rows x 8 bytes.
    assert manifest.bytes.cache == 24 * 8 * 68 + 16 * 8 * 8
    # Float32 are the last biases of two gates alone, one for each of four heads.
    assert manifest.bytes.weights == 2 * manifest.model.parameters + 2 * 2 * 4
    # The CPU's float32 copies are more than the file.
    assert manifest.bytes.peak > manifest.bytes.cache + 2 * manifest.bytes.weights
    parity = manifest.targets["onnx"].parity
    assert parity["events"] >= 5
    assert parity["max_logit_diff"] > 0
    assert "dynamic" not in parity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_dtype="float32"), "--quant fp16 keeps float16 keys and values, not float32: leave out --kv-dtype"),
        (dict(kv_dtype="int8"), "--quant fp16 keeps float16 keys and values, not int8: .* or use --quant none, int8"),
        (dict(quant="none", kv_dtype="float16"), "float32 or int8 keys and values, not float16: .* use --quant fp16"),
        (dict(quant="int4", kv_dtype="float16"), "--quant int4 keeps float32 or int8"),
        (dict(kv_dtype="bfloat16"), "--quant fp16 keeps float16 keys and values, not bfloat16: .* use --quant bf16"),
        (dict(kv_dtype="half"), "KV dtype 'half' is not known: use one of float32, float16, bfloat16, int8"),
        (dict(quant="half"), "quantisation 'half' is not known; use one of none, fp16, bf16, int8, int4, 8da4w"),
        (dict(targets=("executorch",)), "executorch cannot run fp16 weights: .* or --target onnx"),
        (dict(targets=("executorch", "onnx")), "executorch cannot run fp16 weights"),
        (dict(ops=("standard",)), "standard keeps float32 keys and values only: use gqa, or leave out --quant fp16"),
        (dict(policy="global"), "policy global needs float32 keys and values: leave out --quant fp16"),
        (dict(policy="keydiff"), "policy keydiff needs float32 keys"),
        (dict(dtype="float16"), "dtype 'float16' cannot be exported yet"),
    ],
)
def test_settings_that_cannot_be_honoured(model: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_export(fp16_request(model, tmp_path / "out", **change))
    assert list(tmp_path.iterdir()) == []


def test_kv_dtype_may_be_named(model: Path, tmp_path: Path) -> None:
    for asked in (None, "float16"):
        assert plan_export(fp16_request(model, tmp_path / "out", kv_dtype=asked)).config.kv_dtype == "float16"
    assert plan_export(fp16_request(model, tmp_path / "out", quant="none")).config.kv_dtype == "float32"


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = gated_model("qwen3-gqa")
    model.base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 70000.0
    with pytest.raises(ModelError, match=r"q_proj.weight holds 7e\+04, but float16 ends at 65504: use --quant bf16"):
        export_onnx(model, CONFIG, tmp_path, scheme=FP16)
    assert not list(tmp_path.iterdir())


def test_a_cache_and_weights_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    model = gated_model("qwen3-gqa")
    with pytest.raises(ConfigError, match="float16"):
        export_onnx(model, replace(CONFIG, kv_dtype="float32"), tmp_path, scheme=FP16)
    with pytest.raises(ConfigError, match="float16"):
        export_onnx(model, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.finfo(torch.float16).max == 65504
