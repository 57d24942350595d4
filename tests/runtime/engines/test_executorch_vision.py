"""The ExecuTorch engine for pictures: the encoder's file is loaded late, and what is damaged or mixed is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from executorch_vision_artefact import executorch_artefact, open_executorch
from factories import PATCH_VALUES, random_tokens
from onnx_artefact import feed
from vision_artefact import VisionArtefact, long_stream, read
from vision_streams import Mixed

from trimkv_edge.errors import ArtefactError, ModelError, StateError
from trimkv_edge.export.executorch_vision import VISION
from trimkv_edge.runtime.engines import engine_class
from trimkv_edge.runtime.engines import executorch_vision as module
from trimkv_edge.runtime.engines.executorch_vision import ExecuTorchPooledVisionEngine, ExecuTorchVisionEngine

GRID = np.array([[1, 4, 4]])


@pytest.fixture
def artefact() -> VisionArtefact:
    return executorch_artefact("portable", "trimkv")


@pytest.fixture
def copied(artefact: VisionArtefact, tmp_path: Path) -> VisionArtefact:
    """The same in a folder that a test may damage."""
    return replace(artefact, folder=shutil.copytree(artefact.folder, tmp_path / "copy"))


def pixels(patches: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((patches, PATCH_VALUES), np.float32)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:100] + bytes(byte ^ 255 for byte in data[100:200]) + data[200:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda _: b"", lambda _: b"hello" * 99], ids=["cut", "flip", "empty", "text"]
)
def test_damaged_encoder(copied: VisionArtefact, damage: Callable[[bytes], bytes]) -> None:
    path = copied.folder / VISION
    path.write_bytes(damage(path.read_bytes()))
    engine = open_executorch(copied)
    for _ in range(2):
        with pytest.raises(ArtefactError, match=r"vision\.pte does not load in ExecuTorch .*export it again") as caught:
            engine.encode("image", pixels(), GRID)
        assert "\n" not in str(caught.value)
    assert feed(engine, random_tokens(30), (3,))


def test_text_needs_no_encoder(copied: VisionArtefact) -> None:
    (copied.folder / VISION).unlink()
    engine, stream = open_executorch(copied), Mixed(6).text(50)
    want, got = read(copied.eager(), stream, (5,)), read(engine, stream, (5,))
    np.testing.assert_array_equal(want.survivors, got.survivors)
    with pytest.raises(ArtefactError, match=r"vision\.pte is missing"):
        engine.encode("image", pixels(), GRID)
    lacking = replace(copied.target, files={"program": copied.target.files["program"]})
    with pytest.raises(ArtefactError, match="names no vision file"):
        open_executorch(replace(copied, target=lacking)).encode("image", pixels(), GRID)


def test_files_of_another_artefact(copied: VisionArtefact) -> None:
    vision = copied.manifest.vision
    assert vision is not None
    other = replace(copied, manifest=replace(copied.manifest, vision=replace(vision, sizes=((4, 4), (4, 6)))))
    with pytest.raises(ArtefactError, match=r"get_trimkv_picture_sizes = \[4, 4, 4, 6, 6, 4\], but .* \[4, 4, 4, 6\]"):
        open_executorch(other)
    other = replace(copied, manifest=replace(copied.manifest, vision=replace(vision, features=1)))
    with pytest.raises(ArtefactError, match="get_trimkv_features = 2, but the manifest means 1"):
        open_executorch(other)
    shutil.copy(copied.folder / "model.pte", copied.folder / VISION)
    with pytest.raises(ArtefactError, match=r"vision\.pte .*encode_4x4.*export it again"):
        open_executorch(copied).encode("image", pixels(), GRID)


def test_another_size_is_refused(artefact: VisionArtefact) -> None:
    with pytest.raises(ModelError, match="2 x 8 patches: this artefact was exported for 4 x 4, 4 x 6, 6 x 4") as caught:
        open_executorch(artefact).encode("image", pixels(), np.array([[1, 2, 8]]))
    assert "\n" not in str(caught.value)


def test_what_is_encoded_is_the_callers_own(artefact: VisionArtefact) -> None:
    engine = open_executorch(artefact)
    (first,) = engine.encode("image", pixels(), GRID)
    rows, features = first.embeddings.copy(), first.deepstack.copy()
    engine.encode("image", -pixels(), GRID)
    np.testing.assert_array_equal(first.embeddings, rows)
    np.testing.assert_array_equal(first.deepstack, features)


def test_large_encoders_do_not_stay_loaded(artefact: VisionArtefact, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, engine = open_executorch(artefact), open_executorch(artefact)
    grids = [np.array([[1, *size]]) for size in ((4, 4), (4, 6), (4, 4))]
    want = [keeping.encode("image", pixels(int(grid.prod())), grid)[0] for grid in grids]
    monkeypatch.setattr(module, "KEPT_ENCODERS", 1)
    got = [engine.encode("image", pixels(int(grid.prod())), grid)[0] for grid in grids]
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one.embeddings, other.embeddings)
    loaded = [[name for name in each._methods if name.startswith("encode")] for each in (keeping, engine)]
    assert loaded == [["encode_4x4", "encode_4x6"], ["encode_4x4"]]


def test_reset_replays_bit_identically(artefact: VisionArtefact) -> None:
    engine, stream = open_executorch(artefact), long_stream(7)
    first = read(engine, stream, (6, 1))
    engine.show(engine.encode("image", pixels(), GRID))
    engine.reset()
    assert (engine.seen, engine.live, engine.waiting) == (0, 0, [])
    again = read(engine, stream, (6, 1))
    np.testing.assert_array_equal(first.logits, again.logits)
    np.testing.assert_array_equal(first.survivors, again.survivors)


def test_a_state_inside_a_picture(artefact: VisionArtefact) -> None:
    stream = Mixed(1).text(3).image(4, 6).text(9)
    one, other = open_executorch(artefact), open_executorch(artefact)
    for engine in (one, other):
        engine.show(engine.encode("image", stream.pixels["image"][0].numpy(), np.array(stream.image_grids)))
        engine.prefill(stream.tokens[:6])
    state = one.state()
    want = one.prefill(stream.tokens[6:11])
    other.load_state(state)
    np.testing.assert_array_equal(other.prefill(stream.tokens[6:11]), want)
    other.reset()
    with pytest.raises(StateError, match="ends inside a picture, after 2 of its rows"):
        other.load_state(state)


def test_a_failed_step_is_not_counted(artefact: VisionArtefact) -> None:
    stream = Mixed(1).text(3).image(4, 4).text(9)
    engine, plain = open_executorch(artefact), open_executorch(artefact)
    for each in (engine, plain):
        each.show(each.encode("image", stream.pixels["image"][0].numpy(), np.array(stream.image_grids)))
        each.prefill(stream.tokens[:6])
    whole, engine._step = engine._step, engine._step._replace(forward=engine._step.forward[:2])
    with pytest.raises(StateError, match="ExecuTorch failed in forward"):
        engine.decode(stream.tokens[6])
    engine._step = whole
    for token in stream.tokens[6:]:
        np.testing.assert_array_equal(engine.decode(token), plain.decode(token))


@pytest.mark.parametrize("case", [("portable", "trimkv"), ("xnnpack", "global")], ids="-".join)
@pytest.mark.parametrize("sizes", [(1,), (4, 1, 1)])
def test_log_betas_are_eagers_while_rows_wait(case: tuple[str, str], sizes: tuple[int, ...]) -> None:
    made = executorch_artefact(*case)
    eager, engine = made.eager(), open_executorch(made)
    for stream in (long_stream(3), Mixed(4).text(2).image(4, 4).text(3)):
        want, got = read(eager, stream, sizes), read(engine, stream, sizes)
        for mine, theirs in zip(want.survivors, got.survivors, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert engine._gate_rows.waiting
        one, other = eager.state(), engine.state()
        live = one.positions >= 0
        np.testing.assert_allclose(other.log_beta[live], one.log_beta[live], rtol=1e-4, atol=1e-9)


def test_failing_gates_leave_all_as_it_was(artefact: VisionArtefact) -> None:
    stream = Mixed(1).text(3).image(4, 4).text(9)
    engine, plain = open_executorch(artefact), open_executorch(artefact)
    for each in (engine, plain):
        each.show(each.encode("image", stream.pixels["image"][0].numpy(), np.array(stream.image_grids)))
        each.decode(stream.tokens[0])
    whole, engine._gate_inputs = engine._gate_inputs, engine._gate_inputs[:2]
    with pytest.raises(StateError, match="ExecuTorch failed in gates"):
        engine.prefill(stream.tokens[1:6])
    assert (engine.cursor, engine.seen, len(engine.waiting)) == (plain.cursor, 1, 1)
    engine._gate_inputs = whole
    for each in (engine, plain):
        each.prefill(stream.tokens[1:6])
    np.testing.assert_array_equal(engine.state().log_beta, plain.state().log_beta)


def test_engines_of_one_model_do_not_share_their_streams(artefact: VisionArtefact) -> None:
    one, streams = open_executorch(artefact), (long_stream(5), long_stream(6))
    other = one.another()
    for engine in (one, other):
        engine.show(engine.encode("image", pixels(), GRID))
        engine.prefill(Mixed(2).text(2).image(4, 4).tokens)
        engine.reset()
    alone = [read(open_executorch(artefact), stream, (4,)) for stream in streams]
    for engine, stream, want in zip((one, other), streams, alone, strict=True):
        np.testing.assert_array_equal(read(engine, stream, (4,)).logits, want.logits)


def test_the_registry_knows_both_kinds(artefact: VisionArtefact) -> None:
    config = artefact.manifest.cache
    assert engine_class("executorch", config, vision=True) is ExecuTorchVisionEngine
    shared = replace(config, policy="global", caps=((16, 12), (9, 16), (16, 16)), budget=10)
    assert engine_class("executorch", shared, vision=True) is ExecuTorchPooledVisionEngine


def test_importing_the_module_needs_no_torch() -> None:
    code = "import sys; import trimkv_edge.runtime.engines.executorch_vision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0
