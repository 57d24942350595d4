"""Streams of text and pictures: made as asked, and read by calibration as by the eager engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import IMAGE_TOKEN, VISION_START, gated_vision_model, vision_config

from trimkv_edge.calibration.mixed import mixed_streams
from trimkv_edge.calibration.recording import record
from trimkv_edge.calibration.streams import StreamPlan, Streams
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ModelError
from trimkv_edge.export.vision import vision_info
from trimkv_edge.models.mixed_sample import MixedSample
from trimkv_edge.models.source import ModelSource, find_source
from trimkv_edge.models.vision_engine import EagerPooledVisionEngine

CONFIG = CacheConfig(budget=16, buffer=8, prefill_chunk=8, policy="global")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("shape")
    vision_config().save_pretrained(folder)
    return find_source(str(folder), random_weights=True, vision=True)


def made(source: ModelSource, seed: int = 0) -> Streams:
    return mixed_streams(
        source, StreamPlan(150, count=2, held_out=1, seed=seed), vision_info(source, ["32x32", "16x32"])
    )


def test_without_a_tokenizer_streams_are_noise(source: ModelSource) -> None:
    streams = made(source)
    every = [*streams.calibration, *streams.held_out]
    assert [len(stream.tokens) for stream in every if isinstance(stream, MixedSample)] == [150] * 3
    assert len({tuple(stream.tokens) for stream in every if isinstance(stream, MixedSample)}) == 3
    first, again = streams.calibration[0], made(source).calibration[0]
    assert isinstance(first, MixedSample)
    assert isinstance(again, MixedSample)
    assert first.tokens == again.tokens
    np.testing.assert_array_equal(first.pictures[0][1], again.pictures[0][1])
    assert first.tokens.count(VISION_START) == len(first.pictures) == 5
    assert first.tokens.count(IMAGE_TOKEN) == 16 + 8 + 16 + 16  # the fourth is a frame of a video


def test_calibration_reads_them_as_the_engine_does(source: ModelSource) -> None:
    model = gated_vision_model("rg10")
    streams = [stream for stream in made(source).calibration if isinstance(stream, MixedSample)]
    ids = torch.tensor([stream.tokens for stream in streams])
    run = record(model, CONFIG, ids, 8, pictures=[stream.pictures for stream in streams])
    wanted = []
    for stream in streams:
        engine = EagerPooledVisionEngine(model, CONFIG)
        stream.show(engine)
        while engine.seen < len(stream.tokens):
            engine.prefill(stream.tokens[engine.seen : engine.seen + min(8, engine.room)])
            if engine.room == 0:
                engine.evict()
                if engine.seen >= CONFIG.slots:
                    wanted.append(engine.kept.flatten())
    np.testing.assert_array_equal(run.kept, wanted)
    blind = record(model, CONFIG, torch.where(ids == IMAGE_TOKEN, 5, ids), 1)
    assert not np.array_equal(blind.kept, run.kept)


def test_weights_without_words_are_refused(source: ModelSource) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer or no chat_template\.jinja"):
        made(replace(source, random_weights=False, folder=Path(source.folder or "")))
