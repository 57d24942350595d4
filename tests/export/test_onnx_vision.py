"""An exported Qwen3-VL in ONNX Runtime: the eager engine's logits and exactly its survivors, on mixed streams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from factories import gated_vision_model
from vision_artefact import SIZES, VisionArtefact, long_stream, read, vision_manifest
from vision_streams import Mixed

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.models.vision_engine import vision_engine
from trimkv_edge.runtime.engines.onnx_vision import OnnxPooledVisionEngine, OnnxVisionEngine

SMALL = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
CAPS = ((16, 12), (9, 16), (16, 16))
CONFIGS = {
    "trimkv": SMALL,
    "long chunks": replace(SMALL, prefill_chunk=3),
    "global": replace(SMALL, policy="global", caps=CAPS, budget=10),
}


def make(folder: Path, config: CacheConfig, ops: str = "gqa", **changes: object) -> VisionArtefact:
    model = gated_vision_model(**changes)
    target = export_onnx(model, config, folder, ops=ops, sizes=SIZES)
    return VisionArtefact(folder, model, vision_manifest(model, config, target), target)


def open_onnx(made: VisionArtefact) -> OnnxVisionEngine:
    kind = OnnxVisionEngine if made.manifest.cache.caps is None else OnnxPooledVisionEngine
    return kind(made.folder, made.manifest, made.target, threads=1)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], VisionArtefact]:
    root = tmp_path_factory.mktemp("vision")
    return {
        (ops, name): make(root / f"{ops} {name}", config, ops)
        for ops in ("gqa", "standard")
        for name, config in CONFIGS.items()
    }


@pytest.mark.parametrize("ops", ["gqa", "standard"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(8,), (1,), (5, 1, 3)])
def test_keeps_the_eager_survivors(
    artefacts: dict[tuple[str, str], VisionArtefact], ops: str, name: str, sizes: tuple[int, ...]
) -> None:
    made, stream = artefacts[ops, name], long_stream()
    chunk = made.manifest.cache.prefill_chunk
    sizes = tuple(min(size, chunk) for size in sizes)
    want, got = read(made.eager(), stream, sizes), read(open_onnx(made), stream, sizes)
    assert len(want.survivors) > 5
    for one, other in zip(want.survivors, got.survivors, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_encoded_as_by_the_eager_model(
    artefacts: dict[tuple[str, str], VisionArtefact], size: tuple[int, int]
) -> None:
    made = artefacts["gqa", "trimkv"]
    engine, eager, stream = open_onnx(made), made.eager(), Mixed(4).image(*size).video(3, *size)
    for kind, frames in (("image", 1), ("video", 3)):
        pixels, grid = stream.pixels[kind][0].numpy(), np.array([[frames, *size]])
        want, got = eager.encode(kind, pixels, grid), engine.encode(kind, pixels, grid)
        assert len(got) == frames
        for one, other in zip(want, got, strict=True):
            assert (one.kind, one.height, one.width) == (other.kind, other.height, other.width)
            np.testing.assert_allclose(other.embeddings, one.embeddings, atol=1e-5)
            np.testing.assert_allclose(other.deepstack, one.deepstack, atol=1e-5)


def test_what_does_not_fit_is_refused(artefacts: dict[tuple[str, str], VisionArtefact]) -> None:
    engine = open_onnx(artefacts["gqa", "trimkv"])
    pixels = np.zeros((16, engine.vision.patch_values), np.float32)
    with pytest.raises(ModelError, match="2 x 8 patches: this artefact was exported for 4 x 4, 4 x 6, 6 x 4"):
        engine.encode("image", pixels, np.array([[1, 2, 8]]))
    with pytest.raises(ModelError, match=r"needs .16, 96., from RGB pictures"):
        engine.encode("image", pixels[:, :32], np.array([[1, 4, 4]]))
    with pytest.raises(ModelError, match="an image has 1 frame group"):
        engine.encode("image", np.concatenate([pixels] * 2), np.array([[2, 4, 4]]))
    with pytest.raises(ModelError, match="positive whole numbers"):
        engine.encode("image", pixels, np.array([[1, 4, 0]]))


def test_states_go_between_engines(artefacts: dict[tuple[str, str], VisionArtefact]) -> None:
    for name in ("trimkv", "global"):
        made, stream = artefacts["gqa", name], long_stream(3)
        eager, engine = made.eager(), open_onnx(made)
        read(eager, stream, (5,))
        engine.load_state(eager.state())
        more = Mixed(9).image(4, 6).text(20)
        want, got = read(eager, more, (1,)), read(engine, more, (1,))
        np.testing.assert_array_equal(want.survivors, got.survivors)
        np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)


def test_engines_share_a_model(artefacts: dict[tuple[str, str], VisionArtefact]) -> None:
    one = open_onnx(artefacts["gqa", "trimkv"])
    other, streams = one.another(), (long_stream(5), long_stream(6))
    alone = [read(open_onnx(artefacts["gqa", "trimkv"]), stream, (4,)) for stream in streams]
    for engine, stream, want in zip((one, other), streams, alone, strict=True):
        np.testing.assert_array_equal(read(engine, stream, (4,)).logits, want.logits)


def test_sizes_share_one_file_of_weights(tmp_path: Path, artefacts: dict[tuple[str, str], VisionArtefact]) -> None:
    made = artefacts["gqa", "trimkv"]
    weights = sum(parameter.numel() for parameter in made.model.base.model.visual.parameters())
    files = [made.folder / made.target.files[f"vision-{down}x{across}"] for down, across in SIZES]
    assert (made.folder / "vision.onnx.data").stat().st_size < 4 * weights + 4096 * 60
    for path in files:
        onnx.checker.check_model(path)
        stored = onnx.load(path, load_external_data=False).graph.initializer
        assert {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"} <= {
            "vision.onnx.data"
        }


def test_a_quantised_decoder(tmp_path: Path) -> None:
    """Its encoder is float32; the decoder rounds, so tokens are compared with its own text-only path."""
    model = gated_vision_model()
    target = export_onnx(model, SMALL, tmp_path, scheme=SCHEMES["int8"], sizes=SIZES)
    made = VisionArtefact(tmp_path, model, vision_manifest(model, SMALL, target), target)
    engine, stream = open_onnx(made), long_stream()
    pixels, grid = stream.pixels["image"][0].numpy(), np.array([stream.image_grids[0]])
    want = vision_engine(model, SMALL).encode("image", pixels, grid)[0]
    np.testing.assert_allclose(engine.encode("image", pixels, grid)[0].embeddings, want.embeddings, atol=1e-5)
    got, exact = read(engine, stream, (8,)).logits, read(made.eager(), stream, (8,)).logits
    assert 1e-4 < np.abs(np.array(got) - np.array(exact)).max() < 1


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = gated_vision_model()
    with pytest.raises(ConfigError, match="give at least one"):
        export_onnx(model, SMALL, tmp_path)
    half = replace(SMALL, kv_dtype="float16")
    with pytest.raises(ConfigError, match="compute in float32 here"):
        export_onnx(model, half, tmp_path, scheme=SCHEMES["fp16"], sizes=SIZES)
