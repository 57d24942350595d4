"""Qwen3-VL with gates: plain transformers' logits with a roomy budget, the list oracle's survivors with a small one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import gated_vision_model, vision_base
from vision_streams import Mixed, VisionOracle, plain_logits

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.vision_engine import (
    EagerPooledVisionEngine,
    EagerVisionEngine,
    VisionEngine,
    vision_engine,
)

ROOMY = CacheConfig(budget=160, buffer=32, prefill_chunk=32)
SMALL = CacheConfig(budget=12, buffer=8, prefill_chunk=8)
STREAMS = {
    "text": Mixed().text(40),
    "one image": Mixed(1).text(5).image(6, 4).text(9),
    "images of several sizes": Mixed(2).image(4, 4).image(2, 8).text(3).image(10, 6).text(4),
    "video": Mixed(3).text(4).video(3, 4, 6).text(6),
    "conversation": Mixed(4).text(11).image(6, 6).text(13).video(2, 4, 4).text(3).image(2, 2).image(4, 8).text(17),
    "ends inside": Mixed(5).text(3).image(4, 4),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("sizes", [(32,), (7, 1, 3), (1,)])
def test_a_roomy_budget_equals_plain_transformers(name: str, sizes: tuple[int, ...]) -> None:
    stream, model = STREAMS[name], gated_vision_model()
    want = plain_logits(vision_base(), stream)
    engine = vision_engine(model, ROOMY)
    engine.show(stream.pictures(model))
    step = 0
    while engine.seen < len(stream.tokens):
        logits = engine.prefill(stream.tokens[engine.seen : engine.seen + sizes[step % len(sizes)]])
        step += 1
        assert np.abs(logits - want[engine.seen - 1]).max() < 1e-4
    assert not engine.waiting


def test_pictures_from_transformers_image_processor() -> None:
    """Two files' worth of pixels, of odd sizes; the rows stand where the processor puts them."""
    image = pytest.importorskip("PIL.Image")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, 61, 37, 3), dtype=np.uint8)
    given = processor(images=[image.fromarray(noise[0]), image.fromarray(noise[1, :20])], return_tensors="pt")
    grids = given["image_grid_thw"].tolist()
    stream = Mixed(8).text(4)
    for grid, pixels in zip(grids, given["pixel_values"].split([np.prod(grid) for grid in grids]), strict=True):
        stream.image(*grid[1:]).text(3)
        stream.pixels["image"][-1] = pixels
    model = gated_vision_model()
    engine = vision_engine(model, ROOMY)
    engine.show(model.images(given["pixel_values"], given["image_grid_thw"]))
    for start in range(0, len(stream.tokens), 32):
        logits = engine.prefill(stream.tokens[start : start + 32])
    assert np.abs(logits - plain_logits(vision_base(), stream)[-1]).max() < 1e-4


def test_the_parity_depends_on_pictures_positions_and_deepstack() -> None:
    """What the comparison above rests on: each of them changes the logits by far more than its tolerance."""
    stream, model = STREAMS["one image"], gated_vision_model()
    want = plain_logits(vision_base(), stream)[-1]
    (picture,) = stream.pictures(model)
    changed = {
        "embeddings": replace(picture, embeddings=np.zeros_like(picture.embeddings)),
        "first feature": replace(picture, deepstack=picture.deepstack * np.array([0, 1], np.float32)[:, None, None]),
        "last feature": replace(picture, deepstack=picture.deepstack * np.array([1, 0], np.float32)[:, None, None]),
        "sides": replace(picture, height=picture.width, width=picture.height),
    }
    for change, other in changed.items():
        engine = vision_engine(model, ROOMY)
        engine.show([other])
        assert np.abs(engine.prefill(stream.tokens) - want).max() > 1e-2, change


@pytest.mark.parametrize(
    ("policy", "kind"), [("trimkv", "rg"), ("trimkv", "rg10"), ("global", "rg10"), ("layer", "rg10")]
)
def test_survivors_and_logits_equal_the_oracle(policy: str, kind: str) -> None:
    """Pictures larger than budget and buffer together are read through the bounded cache."""
    config = CacheConfig(budget=12, buffer=8, prefill_chunk=8, policy=policy)
    stream = Mixed(6).text(9).image(12, 10).text(21).image(4, 4).text(2).video(3, 4, 6).text(14).image(8, 2).text(25)
    model = gated_vision_model(kind)
    engine, oracle = vision_engine(model, config), VisionOracle(model, config)
    oracle.begin(vision_base(), stream)
    engine.show(stream.pictures(model))
    rng, events = np.random.default_rng(0), 0
    while engine.seen < len(stream.tokens):
        size = int(rng.integers(1, min(engine.room, 8) + 1))
        chunk = stream.tokens[engine.seen : engine.seen + size]
        got, want = engine.prefill(chunk), oracle.read(chunk)
        assert np.abs(got - want).max() < 1e-4
        if engine.room == 0:
            engine.evict()
            events += 1
        np.testing.assert_array_equal(np.sort(engine.survivors(), axis=-1), np.sort(oracle.positions(), axis=-1))
    assert events >= 12
    pictures = stream.inputs()["mm_token_type_ids"][0] > 0
    held = np.unique(engine.survivors())
    assert 0 < pictures[held[held >= 0]].sum() < (held >= 0).sum()  # both modalities are held


def test_text_needs_no_pictures() -> None:
    """The engines for text read it with the same numbers; plain positions are what M-RoPE gives it."""
    stream, model = STREAMS["text"], gated_vision_model("rg10")
    engine = EagerEngine(model, CacheConfig(budget=8, buffer=8, prefill_chunk=8))
    mixed = vision_engine(model, engine.config)
    for token in stream.tokens:
        np.testing.assert_allclose(engine.decode(token), mixed.decode(token), rtol=0, atol=1e-6)
        for each in (engine, mixed):
            if not each.room:
                each.evict()
    np.testing.assert_array_equal(engine.survivors(), mixed.survivors())


def test_a_reset_engine_reads_the_same_again() -> None:
    stream, model = STREAMS["one image"], gated_vision_model()
    engine = vision_engine(model, ROOMY)
    engine.show(stream.pictures(model) * 2)
    first = engine.prefill(stream.tokens[:8])
    engine.reset()
    assert not engine.waiting
    engine.show(stream.pictures(model))
    np.testing.assert_array_equal(engine.prefill(stream.tokens[:8]), first)


def test_a_failed_chunk_leaves_the_engine_as_it_was() -> None:
    stream, model = STREAMS["one image"], gated_vision_model()
    engine, plain = vision_engine(model, ROOMY), vision_engine(model, ROOMY)
    for each in (engine, plain):
        each.show(stream.pictures(model))
        each.prefill(stream.tokens[:8])
    with pytest.raises(StateError, match="has 6 rows, but its placeholders end after 2"):
        engine.prefill([5])
    assert (engine.seen, len(engine.waiting)) == (8, 1)
    np.testing.assert_array_equal(engine.prefill(stream.tokens[8:]), plain.prefill(stream.tokens[8:]))


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, policy="global")], ids=["trimkv", "global"])
def test_a_saved_state_goes_on_behind_a_picture(config: CacheConfig) -> None:
    stream, model = STREAMS["conversation"], gated_vision_model()
    pictures = stream.pictures(model)
    one, other = (vision_engine(model, config) for _ in range(2))
    one.show(pictures)
    step = len(stream.tokens) - 10  # in the text behind the last picture
    read(one, stream.tokens[:step])
    other.show(pictures[:1])
    other.load_state(one.state())
    assert not other.waiting
    np.testing.assert_array_equal(read(other, stream.tokens[step:]), read(one, stream.tokens[step:]))


def read(engine: VisionEngine, tokens: list[int]) -> np.ndarray:
    logits = np.zeros(0)
    for token in tokens:
        logits = engine.decode(token)
        if not engine.room:
            engine.evict()
    return logits


def test_a_state_inside_a_picture_goes_on_only_where_its_rows_are() -> None:
    stream, model = STREAMS["one image"], gated_vision_model()
    one, other = (vision_engine(model, ROOMY) for _ in range(2))
    for engine in (one, other):
        engine.show(stream.pictures(model))
        engine.prefill(stream.tokens[:8])
    other.reset()
    state = one.state()
    with pytest.raises(StateError, match="ends inside a picture, after 2 of its rows"):
        other.load_state(state)
    one.load_state(state)
    assert len(one.waiting) == 1
    one.prefill(stream.tokens[8:])


def test_rows_of_another_model_are_refused() -> None:
    stream = STREAMS["one image"]
    engine = vision_engine(gated_vision_model(), ROOMY)
    with pytest.raises(StateError, match="2 DeepStack features of width 96, but this model has 2 of width 64"):
        engine.show(stream.pictures(gated_vision_model(hidden_size=96)))


def test_the_policy_chooses_the_engine() -> None:
    model = gated_vision_model("rg10")
    assert isinstance(vision_engine(model, CacheConfig(budget=8, buffer=4, prefill_chunk=4)), EagerVisionEngine)
    shared = CacheConfig(budget=8, buffer=4, prefill_chunk=4, policy="global")
    assert isinstance(vision_engine(model, shared), EagerPooledVisionEngine)
