"""The shipped model as a host-evicted artefact with its tokenizer, exported once per test run; shared by tests."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

from onnx_artefact import make_manifest
from text_artefact import save_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.export.host_evicted import export_host_evicted
from trimkv_edge.export.tokenizer import copy_tokenizer
from trimkv_edge.manifest import ByteInfo
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source

CONFIG = CacheConfig(budget=96, buffer=32, prefill_chunk=24)


@cache
def tiny_host() -> Path:
    """The artefact; copy it before changing it."""
    folder = Path(mkdtemp(prefix="tiny-host-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = find_source("tiny")
    model = load_model(source).model
    target = export_host_evicted(model, CONFIG, folder)
    tokenizer = copy_tokenizer(source.folder, folder, source.config)
    manifest = make_manifest(model, CONFIG, target)
    save_manifest(
        folder,
        manifest,
        tokenizer=tokenizer,
        targets={"host-evicted": target},
        bytes=ByteInfo(1_000_000, 5_000_000, 10_000_000),
    )
    return folder


class Decoded(NamedTuple):
    """What an engine did: ``(seen, kept positions of each row)`` of every event, and the greedy tokens."""

    events: list[tuple[int, list[list[int]]]]
    said: list[int]


def decoded(engine: Engine, tokens: list[int], new: int) -> Decoded:
    """Reads ``tokens`` in chunks and goes on greedily; events run as soon as they are due."""
    made = Decoded([], [])

    def read(ids: list[int]) -> int:
        logits = engine.prefill(ids)
        if engine.room == 0:
            engine.evict()
            rows = engine.num_layers * engine.num_kv_heads
            made.events.append((engine.seen, engine.survivors().reshape(rows, -1).tolist()))
        return int(logits.argmax())

    at = 0
    while at < len(tokens):
        count = min(CONFIG.prefill_chunk, engine.room, len(tokens) - at)
        newest = read(tokens[at : at + count])
        at += count
    for left in reversed(range(new)):
        made.said.append(newest)
        if left:
            newest = read([newest])
    return made
