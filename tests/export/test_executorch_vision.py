"""An exported Qwen3-VL in ExecuTorch: the eager engine's logits and exactly its survivors, on mixed streams."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch_vision_artefact import CONFIGS, SMALL, executorch_artefact, open_executorch
from factories import PATCH_VALUES, gated_model, gated_vision_model, vision_base, vision_config
from transformers import AutoModelForImageTextToText
from vision_artefact import SIZES, VisionArtefact, long_stream, read, vision_manifest
from vision_streams import Mixed, plain_logits

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.executorch import PROGRAM, build_program, build_vision, export_executorch
from trimkv_edge.export.executorch_check import operators, portable_kernels
from trimkv_edge.export.executorch_quantize import reference_model
from trimkv_edge.export.executorch_vision import VISION, decoder_part
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.mixed_engine import MixedEngine
from trimkv_edge.models.gates import GateShape, random_gates
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.skeleton import hollow, model_weights
from trimkv_edge.models.vision_engine import vision_engine
from trimkv_edge.pictures import Picture

STREAMS = {
    "text": Mixed().text(40),
    "one image": Mixed(1).text(5).image(6, 4).text(9),
    "images of several sizes": Mixed(2).image(4, 4).image(4, 6).text(3).image(6, 4).text(4),
    "video": Mixed(3).text(4).video(3, 4, 6).text(6),
    "conversation": Mixed(4).text(11).image(4, 6).text(13).video(2, 4, 4).text(3).image(6, 4).image(4, 4).text(17),
    "ends inside": Mixed(5).text(3).image(4, 4),
}
OPS = pytest.mark.parametrize("ops", ["xnnpack", "portable"])


@OPS
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(8,), (1,), (5, 1, 3)])
def test_keeps_the_eager_survivors(ops: str, name: str, sizes: tuple[int, ...]) -> None:
    made, stream = executorch_artefact(ops, name), long_stream()
    want, got = read(made.eager(), stream, sizes), read(open_executorch(made), stream, sizes)
    assert len(want.survivors) > 5
    for one, other in zip(want.survivors, got.survivors, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("sizes", [(32,), (7, 1, 3), (1,)])
def test_a_roomy_budget_equals_plain_transformers(name: str, sizes: tuple[int, ...]) -> None:
    made, stream = executorch_artefact("xnnpack", "roomy"), STREAMS[name]
    want, got = plain_logits(vision_base(), stream), read(open_executorch(made), stream, sizes)
    ends, turn = [], 0
    while sum(ends) < len(stream.tokens):
        ends.append(min(sizes[turn % len(sizes)], len(stream.tokens) - sum(ends)))
        turn += 1
    np.testing.assert_allclose(got.logits, want[np.cumsum(ends) - 1], atol=1e-4)


@OPS
@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_encoded_as_by_the_eager_model(ops: str, size: tuple[int, int]) -> None:
    made = executorch_artefact(ops, "trimkv")
    engine, eager, stream = open_executorch(made), made.eager(), Mixed(4).image(*size).video(3, *size)
    for kind, frames in (("image", 1), ("video", 3)):
        pixels, grid = stream.pixels[kind][0].numpy(), np.array([[frames, *size]])
        want, got = eager.encode(kind, pixels, grid), engine.encode(kind, pixels, grid)
        assert len(got) == frames
        for one, other in zip(want, got, strict=True):
            assert (one.kind, one.height, one.width) == (other.kind, other.height, other.width)
            np.testing.assert_allclose(other.embeddings, one.embeddings, atol=2e-5)
            np.testing.assert_allclose(other.deepstack, one.deepstack, atol=2e-5)


@pytest.mark.parametrize("case", [("xnnpack", "trimkv"), ("portable", "trimkv"), ("xnnpack", "global")], ids="-".join)
def test_states_go_between_engines(case: tuple[str, str]) -> None:
    made, stream = executorch_artefact(*case), long_stream(3)
    straight, eager, engine = made.eager(), made.eager(), open_executorch(made)
    for each in (straight, eager):
        read(each, stream, (5,))
    read(engine, Mixed(8).text(3).image(4, 4).text(30), (6,))  # leftovers of another stream must not matter
    engine.load_state(eager.state())
    more, last = Mixed(9).image(4, 6).text(20), Mixed(10).text(2).video(2, 6, 4).text(20)
    got = read(engine, more, (3,))
    eager.reset()
    eager.load_state(engine.state())
    back = read(eager, last, (4,))
    for part, mine in ((more, got), (last, back)):
        want = read(straight, part, (3,) if part is more else (4,))
        np.testing.assert_array_equal(want.survivors, mine.survivors)
        np.testing.assert_allclose(mine.logits, want.logits, atol=2e-4)


@OPS
def test_far_positions(ops: str) -> None:
    made, stream = executorch_artefact(ops, "trimkv"), Mixed(11).text(4).image(4, 6).text(15)
    engine, eager, far = open_executorch(made), made.eager(), 9_990_000
    read(eager, long_stream(3), (5,))
    state = eager.state()
    assert state.cursor is not None
    state = replace(
        state,
        seen=state.seen + far,
        positions=state.positions + far,
        cursor=replace(state.cursor, position=state.cursor.position + far),
    )
    for each in (engine, eager):
        each.load_state(state)
    want, got = (read(each, stream, (4, 1)) for each in (eager, engine))
    assert len(want.survivors) > 1
    np.testing.assert_array_equal(want.survivors, got.survivors)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)


@OPS
def test_sizes_share_their_weights(ops: str) -> None:
    made = executorch_artefact(ops, "trimkv")
    one = build_vision(made.model, SIZES[:1], ops=ops).buffer
    three = (made.folder / VISION).read_bytes()
    weights = 4 * sum(parameter.numel() for parameter in made.model.base.model.visual.parameters())
    assert len(three) < 1.3 * len(one)
    # Position embeddings are in it once for each size, for its patches only.
    assert 0.9 * weights < len(one) < 1.3 * weights
    for content in (three, (made.folder / PROGRAM).read_bytes()):
        assert b".py" not in content


def test_what_the_methods_take() -> None:
    engine = open_executorch(executorch_artefact("xnnpack", "trimkv"))
    inputs = {
        "forward": [(1, 8, 64), (3, 8), (2, 8, 64), (1,)],
        "gates": [(1,), *[(1, 8, 64)] * 3],
        "embed": [(1, 8)],
    }
    for name, shapes in inputs.items():
        metadata = engine._program.method_meta(name)
        assert [metadata.input_tensor_meta(i).sizes() for i in range(metadata.num_inputs())] == shapes
    metadata = engine._program.method_meta("forward")
    outputs = [metadata.output_tensor_meta(i).sizes() for i in range(metadata.num_outputs())]
    assert outputs == [(1, 1, 320), *[(1, 8, 64)] * 3]
    assert engine._program.method_meta("embed").output_tensor_meta(0).sizes() == (1, 8, 64)
    engine.encode("image", np.zeros((24, PATCH_VALUES), np.float32), np.array([[1, 4, 6]]))
    metadata = engine._encoders.method_meta("encode_4x6")
    assert metadata.input_tensor_meta(0).sizes() == (24, PATCH_VALUES)
    assert [metadata.output_tensor_meta(i).sizes() for i in range(2)] == [(6, 64), (2, 6, 64)]


@OPS
def test_kernels(ops: str) -> None:
    """Portable programs need portable kernels only; XNNPACK gets all matrix products, and none of the cache."""
    folder = executorch_artefact(ops, "trimkv").folder
    found = dict[str, Counter[str]]()
    for name in (PROGRAM, VISION):
        program = deserialize_pte_binary((folder / name).read_bytes()).program
        found |= operators(SimpleNamespace(executorch_program=program))
    assert found["embed"] == {"aten::embedding.out": 1, "delegate": 0}
    for name in ("forward", "gates", *(f"encode_{down}x{across}" for down, across in SIZES)):
        products = [kernel for kernel in found[name] if kernel.startswith(("aten::mm", "aten::addmm", "aten::bmm"))]
        assert bool(found[name]["delegate"]) != bool(products)
        assert bool(products) == (ops == "portable")
        if ops == "portable":
            kernels = {kernel for kernel in found[name] if kernel.startswith(("aten::", "llama::"))}
            assert kernels - portable_kernels() <= {"aten::sym_size.int"}
    if ops == "xnnpack":
        assert found["forward"]["llama::custom_sdpa.out"] == 3
        assert not [kernel for kernel in found["forward"] if kernel.startswith(("aten::copy", "aten::index_put"))]


def test_a_quantised_decoder(tmp_path: Path) -> None:
    """Of a hollow model: its encoder is float32, its decoder rounds, and what that makes of the stream stays near."""
    model, values = gated_vision_model(), gated_vision_model()
    hollow(model)
    target = export_executorch(
        model, SMALL, tmp_path, scheme=SCHEMES["8da4w"], weights=model_weights(values), sizes=SIZES[2:]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [PROGRAM, VISION]
    engine = open_executorch(VisionArtefact(tmp_path, model, manifest_for(model, SMALL, target, SIZES[2:]), target))
    stream, exact = STREAMS["one image"], vision_engine(values, SMALL)
    pixels, grid = stream.pixels["image"][0].numpy(), np.array(stream.image_grids)
    want, got = (each.encode("image", pixels, grid)[0] for each in (exact, engine))
    np.testing.assert_allclose(got.embeddings, want.embeddings, atol=2e-5)
    np.testing.assert_allclose(got.deepstack, want.deepstack, atol=2e-5)
    check_rounding(engine, values, "8da4w", [want])


def test_a_decoder_of_8_bits(tmp_path: Path) -> None:
    model, scheme = gated_vision_model(), SCHEMES["int8"]
    target = Target("executorch", "xnnpack", {"program": PROGRAM})
    with (tmp_path / PROGRAM).open("wb") as file:
        build_program(model, SMALL, scheme=scheme, sizes=SIZES).write_to_file(file)
    floats = executorch_artefact("xnnpack", "trimkv").folder / PROGRAM
    assert (tmp_path / PROGRAM).stat().st_size < 0.6 * floats.stat().st_size
    engine = open_executorch(VisionArtefact(tmp_path, model, vision_manifest(model, SMALL, target), target))
    check_rounding(engine, model, "int8", STREAMS["one image"].pictures(model))


def check_rounding(engine: MixedEngine, model: GatedVisionModel, scheme: str, pictures: list[Picture]) -> None:
    """The engine computes what the eager model of the rounded numbers does, which is not what the exact one does."""
    rounded = vision_engine(reference_model(decoder_part(model), model_weights(model), SCHEMES[scheme]), SMALL)
    tokens, logits = STREAMS["one image"].tokens, []
    for each in (engine, rounded, vision_engine(model, SMALL)):
        each.show(pictures)
        logits.append(np.array([each.prefill(tokens[start : start + 4]) for start in range(0, 16, 4)]))
    rounding = np.abs(logits[1] - logits[2]).max()
    assert rounding > 1e-2
    # Activations that are rounded may fall on the other side of a step.
    assert np.abs(logits[0] - logits[1]).max() < (1e-4 if scheme == "int8" else 0.5 * rounding)


def manifest_for(
    model: GatedVisionModel, config: CacheConfig, target: Target, sizes: tuple[tuple[int, int], ...]
) -> Manifest:
    made = vision_manifest(model, config, target)
    assert made.vision is not None
    return replace(made, vision=replace(made.vision, sizes=sizes))


def test_a_model_without_deepstack(tmp_path: Path) -> None:
    shape = vision_config(tie_word_embeddings=True)
    shape.vision_config.deepstack_visual_indexes = []
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_config(shape, dtype=torch.float32).eval()
    plain = AutoModelForImageTextToText.from_config(deepcopy(shape), dtype=torch.float32).eval()
    plain.load_state_dict(base.state_dict())
    model = GatedVisionModel(base, random_gates("rg", GateShape.of(shape), 24, 0)).eval().requires_grad_(False)
    config = CacheConfig(budget=32, buffer=4, prefill_chunk=4)
    target = export_executorch(model, config, tmp_path, ops="portable", sizes=[(4, 4)])
    manifest = manifest_for(model, config, target, ((4, 4),))
    engine, stream = open_executorch(VisionArtefact(tmp_path, model, manifest, target)), Mixed(1).text(5).image(4, 4)
    got = read(engine, stream.text(9), (4,)).logits
    assert engine._program.method_meta("forward").num_inputs() == 3
    want = plain_logits(plain, stream)
    np.testing.assert_allclose(got, want[[*range(3, len(want), 4)]], atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = gated_vision_model()
    with pytest.raises(ConfigError, match="give at least one"):
        export_executorch(model, SMALL, tmp_path)
    with pytest.raises(ConfigError, match="picture size 4 x 3 in patches: give multiples of 2"):
        export_executorch(model, SMALL, tmp_path, sizes=[(4, 4), (4, 3)])
    with pytest.raises(ConfigError, match="reads text only"):
        export_executorch(gated_model("llama-gqa"), SMALL, tmp_path, sizes=SIZES)
    with pytest.raises(ConfigError, match="no kernels for fp16 weights on CPUs: use --quant 8da4w"):
        export_executorch(model, SMALL, tmp_path, scheme=SCHEMES["fp16"], sizes=SIZES)
    assert not list(tmp_path.iterdir())
