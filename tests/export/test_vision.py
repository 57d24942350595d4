"""Exports of models that read pictures: their sizes, what verification compares, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_request import request_for
from factories import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, base_config, vision_config

from trimkv_edge.engine import Cursor
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export import check_artefact
from trimkv_edge.export.pipeline import plan_export, run_export
from trimkv_edge.export.vision import vision_info
from trimkv_edge.manifest import VisionInfo, load_manifest
from trimkv_edge.mixed_stream import place
from trimkv_edge.models.mixed_sample import mixed_sample
from trimkv_edge.models.source import find_source
from trimkv_edge.pictures import Picture
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.engines.onnx_vision import OnnxVisionEngine

SIZES = ("32x32", "48x32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vision_config().save_pretrained(folder)
    return folder


def wanted(model: Path, output: Path, **more: Any) -> Any:
    return request_for(model, output, **{"targets": ("onnx",), "image_sizes": SIZES, **more})


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "artefact"
    run_export(plan_export(wanted(model, output)), lambda _: None)
    return output


def test_the_manifest_tells_how_pictures_enter(artefact: Path) -> None:
    manifest = load_manifest(artefact)
    assert manifest.vision == VisionInfo(
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        start_token_id=VISION_START,
        end_token_id=VISION_END,
        features=2,
        sizes=((8, 8), (8, 12)),  # patches of 4 pixels, down x across
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    assert manifest.bytes.weights == 4 * manifest.model.parameters
    assert {name for name in manifest.files if name.endswith(".onnx")} == {
        "decoder.onnx",
        "embed.onnx",
        "evict.onnx",
        "gates.onnx",
        "vision-8x8.onnx",
        "vision-8x12.onnx",
    }


def test_verification_read_pictures(artefact: Path) -> None:
    parity = load_manifest(artefact).targets["onnx"].parity
    assert parity["events"] >= 5
    # Of 16 rows and then of 24, each with as much text behind it: one of each fits into the 59 tokens.
    assert parity["pictures"] == 1
    assert 0 <= parity["max_picture_diff"] < 1e-5
    assert parity["survivor_mismatches"] == parity["greedy_mismatches"] == parity["undecidable"] == 0
    assert isinstance(load_engine(Artefact.load(artefact), "onnx"), OnnxVisionEngine)


def test_an_encoder_that_is_off_is_not_shipped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_artefact.engine_class

    def wrong(*args: Any, **settings: Any) -> type[OnnxVisionEngine]:
        class Off(right(*args, **settings)):  # type: ignore[misc]
            def _encode(self, size: Any, pixels: Any) -> Any:
                rows, features = super()._encode(size, pixels)
                return rows * 1.001, features

        return Off

    monkeypatch.setattr(check_artefact, "engine_class", wrong)
    with pytest.raises(VerificationError, match=r"pictures differ by 1.0.e-03, allowed 1e-04"):
        run_export(plan_export(wanted(model, tmp_path / "made")), lambda _: None)
    assert not list(tmp_path.iterdir())


def source_of(model: Path) -> Any:
    return find_source(str(model), random_weights=True, vision=True)


def test_sizes_are_pixels_across_and_down(model: Path, tmp_path: Path) -> None:
    assert vision_info(source_of(model), ["80x48"]).sizes == ((12, 20),)
    # 512 x 512 pixels in all: 22 x 12 rows of 8 pixels would be 2:1; the sides of 2:3 are 627.07 and 418.05 pixels.
    assert vision_info(source_of(model), []).sizes == ((128, 128), (104, 156), (156, 104))
    small = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 96 * 64},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(small))
    found = vision_info(source_of(tmp_path), [])
    assert found.sizes == ((18, 18), (16, 24), (24, 16))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ConfigError, match="at most 6144 pixels"):
        vision_info(source_of(tmp_path), ["96x96"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**small, "patch_size": 8}))
    with pytest.raises(ConfigError, match="patch_size 8, but the encoder has 4: take the two files from one model"):
        vision_info(source_of(tmp_path), [])


@pytest.mark.parametrize("size", ["64", "64x", "63x64", "0x64", "64x64x64", "64x64 ", "-8x8"])
def test_sizes_that_are_none_are_refused(model: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"give WIDTHxHEIGHT in pixels, both multiples of 8, such as 128x128"):
        vision_info(source_of(model), [size])


def test_a_size_is_named_once(model: Path) -> None:
    with pytest.raises(ConfigError, match="one is given twice"):
        vision_info(source_of(model), ["64x64", "64x64"])


def test_what_a_target_cannot_do_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target host-evicted runs text models only: use .*onnx"):
        plan_export(wanted(model, tmp_path / "a", targets=("onnx", "host-evicted")))
    text = tmp_path / "text"
    base_config("qwen3-gqa").save_pretrained(text)
    with pytest.raises(ConfigError, match="--image-sizes is for models that read pictures"):
        plan_export(wanted(text, tmp_path / "a"))


@pytest.mark.parametrize("count", [5, 21, 22, 60, 400])
def test_a_sample_has_as_many_placeholders_as_rows(model: Path, count: int) -> None:
    info = vision_info(source_of(model), SIZES)
    sample = mixed_sample([IMAGE_TOKEN, 7, VISION_START, *range(count - 3)], info)
    assert len(sample.tokens) == count
    pictures = [
        Picture(kind, *info.rows(tuple(grid[0, 1:])), *(np.zeros(shape) for shape in shapes(info, grid)))
        for kind, _, grid in sample.pictures
    ]
    kinds = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}
    placed = place(np.array(sample.tokens), Cursor(), pictures, kinds)
    assert placed.finished == len(pictures) == sum(token == VISION_START for token in sample.tokens)
    assert len(pictures) == {5: 0, 21: 0, 22: 1, 60: 1, 400: 9}[count]  # starts 3, 40, 93, 130, ... 363
    assert {kind for kind, _, _ in sample.pictures} == ({"image", "video"} if count == 400 else kinds_of(pictures))


def kinds_of(pictures: list[Picture]) -> set[str]:
    return {"image"} if pictures else set()


def shapes(info: VisionInfo, grid: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    down, across = info.rows(tuple(grid[0, 1:]))
    return (down * across, 1), (2, down * across, 1)


def test_a_quantised_decoder_is_verified_too(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    manifest = run_export(plan_export(wanted(model, output, quant="int8")), lambda _: None)
    exact = run_export(plan_export(replace(wanted(model, tmp_path / "exact"))), lambda _: None)
    assert manifest.targets["onnx"].parity["pictures"] == 1
    saved = exact.bytes.weights - manifest.bytes.weights
    encoder = 4 * sum(p.numel() for p in source_of(model).outline().model.visual.parameters())
    assert encoder < manifest.bytes.weights
    assert saved > 0.5 * (exact.bytes.weights - encoder)
