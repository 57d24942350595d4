"""Bytes by hand, and what the estimate of an export must not miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from factories import gated_model

from trimkv_edge.budget import ModelShape
from trimkv_edge.config import CacheConfig
from trimkv_edge.export.estimate import estimate
from trimkv_edge.export.pipeline import ExportRequest, plan_export
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.quantization.bits import stored_bytes

CONFIG = CacheConfig(1024)
PHI3 = ModelShape(32, 3072, 8192, 32, 32, 96, 32064, 3_922_000_000)
STORED, CACHE, LARGEST = 2_550_000_000, 919_000_000, 394_000_000


def test_bytes_of_a_packed_model() -> None:
    model = gated_model("phi3-mha")  # 2 layers, width 64, inner 96, 4 heads of 16, vocabulary 320, gates 24 wide
    per_layer = 4 * (2 * 64) + 4 * (24 + 4)  # norms; gate biases
    packed = {8: 32 + 4, 4: 16 + 4}  # bytes of a block of 32 with its scale

    def blocks(rows: int, width: int, bits: int) -> int:
        return rows * -(-width // 32) * packed[bits]

    layer = blocks(192, 64, 4) + blocks(64, 64, 4) + blocks(192, 64, 4) + blocks(64, 96, 4)
    gate = blocks(24, 64, 8) + blocks(4, 24, 8)
    ends = blocks(320, 64, 8) + blocks(320, 64, 4) + 4 * 64
    assert stored_bytes(model, SCHEMES["int4"]) == 2 * (layer + gate + per_layer) + ends
    every = sum(parameter.numel() for parameter in model.parameters())
    assert stored_bytes(model, SCHEMES["none"]) == 4 * every
    # The last biases of two gates stay float32, one for each of four heads.
    assert stored_bytes(model, SCHEMES["fp16"]) == 2 * every + 2 * 2 * 4


def test_a_large_model_is_never_in_memory() -> None:
    cost = estimate(
        PHI3, CONFIG, ("onnx",), SCHEMES["int4"], stored=STORED, cache=CACHE, largest=LARGEST, gates=407_000_000
    )
    smaller = estimate(
        PHI3,
        replace(CONFIG, budget=512),
        ("onnx",),
        SCHEMES["int4"],
        stored=STORED,
        cache=510_132_224,
        largest=LARGEST,
        gates=407_000_000,
    )
    # 5.08 GiB were measured.
    assert 0.75 < smaller.memory / (5.08 * 2**30) < 1.25
    assert cost.memory - smaller.memory == 2 * (CACHE - 510_132_224)
    # Five events of 1,152 slots x 1,024 heads x 2 x 96 floats beside the artefact.
    assert cost.disk == STORED + 5 * 1152 * 1024 * 2 * 96 * 4
    small = replace(PHI3, num_layers=2, parameters=100_000_000)
    whole = estimate(
        small, CONFIG, ("onnx",), SCHEMES["none"], stored=400_000_000, cache=CACHE, largest=LARGEST, gates=0
    )
    assert whole.memory > 3 * 400_000_000 + 2 * CACHE
    assert whole.disk == 400_000_000
    both = estimate(
        small,
        CONFIG,
        ("onnx", "executorch"),
        SCHEMES["none"],
        stored=400_000_000,
        cache=CACHE,
        largest=LARGEST,
        gates=0,
    )
    assert both.disk == 800_000_000
    assert both.seconds > whole.seconds


def test_float16_is_opened_as_float32_too() -> None:
    qwen = ModelShape(28, 1024, 3072, 16, 8, 128, 151936, 610_859_232)
    config = CacheConfig(128, 64, 64, kv_dtype="float16")
    sizes = dict(stored=1_221_718_912, cache=22_421_504, largest=622_329_856, gates=59_237_248)
    cost = estimate(qwen, config, ("onnx",), SCHEMES["fp16"], **sizes)
    # 3.84 GiB were measured; without the copies 3.25 would be predicted.
    assert 1.0 < cost.memory / (3.84 * 2**30) < 1.25


def test_half_precision_takes_less_time_than_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimkv_edge.export.estimate._speed", lambda: (0.045, 1e11))
    sizes = dict(stored=STORED, cache=CACHE, largest=LARGEST, gates=0)
    half, packed = (estimate(PHI3, CONFIG, ("onnx",), SCHEMES[name], **sizes).seconds for name in ("fp16", "int4"))
    assert half < 0.8 * packed


def test_executorch_opens_one_copy() -> None:
    """Phi-3-mini int8: 6.35 GiB were measured; with the mapped file counted too 10.4 would be predicted."""
    sizes = dict(stored=4_413_849_600, cache=509_607_936, largest=394_002_432, gates=409_000_000)
    for name, stored, measured in (("int8", 4_413_849_600, 6_813_163_520), ("8da4w", 2_552_659_968, 5_349_408_768)):
        cost = estimate(
            PHI3, replace(CONFIG, budget=512), ("executorch",), SCHEMES[name], **{**sizes, "stored": stored}
        )
        assert 0.8 < cost.memory / measured < 1.25


def test_a_large_vocabulary_in_executorch() -> None:
    """Llama-3.2-3B 8da4w: 3.89 GiB were measured, while the reference reads the output layer."""
    llama = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, 3_256_919_264)
    sizes = dict(stored=2_501_544_832, cache=148_000_000, largest=1_575_000_000, gates=177_000_000)
    cost = estimate(llama, replace(CONFIG, budget=512), ("executorch",), SCHEMES["8da4w"], **sizes)
    assert 0.8 < cost.memory / 4_175_872_000 < 1.25


@pytest.mark.parametrize(("target", "measured"), [("onnx", 17_804_000_000), ("executorch", 18_362_000_000)])
def test_floats_are_opened_once(target: str, measured: int) -> None:
    """Phi-3-mini in float32: 16.6 and 17.1 GiB were measured."""
    sizes = dict(stored=15_691_000_000, cache=509_607_936, largest=394_002_432, gates=409_000_000)
    cost = estimate(PHI3, replace(CONFIG, budget=512), (target,), SCHEMES["none"], **sizes)
    assert 0.8 < cost.memory / measured < 1.25


def test_packed_integers_take_more_than_their_file_in_onnxruntime(tmp_path: Path) -> None:
    """Phi-3-mini int4: 3,308 MiB after a chunk, of which 228 are the cache and 2,434 the file's weights."""
    request = ExportRequest("tiny", tmp_path / "out", "64", buffer=32, prefill_chunk=32, targets=("onnx",))
    plain, packed, program = (
        plan_export(replace(request, **changes)).memory
        for changes in ({}, {"quant": "int4"}, {"quant": "8da4w", "targets": ("executorch",)})
    )
    parameters = plan_export(request).shape.parameters
    assert packed.workspace - plain.workspace == parameters // 8
    assert program.workspace == plain.workspace
