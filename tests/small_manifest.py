"""A manifest with every section filled, and a folder of small files that it fits; no model behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.card import write_card
from trimkv_edge.manifest import (
    ByteInfo,
    FileInfo,
    GateInfo,
    Manifest,
    ModelInfo,
    RopeInfo,
    Target,
    TokenizerInfo,
    describe_files,
)

FILES = {
    "model.pte": bytes(range(256)) * 300,
    "decoder.onnx": b"graph",
    "decoder.onnx.data": b"\0" * 4096,
    "evict.onnx": b"other graph",
    "tokenizer.json": '{"é": 1}'.encode(),
    "empty": b"",
    "sub/more.json": b"{}",
}
PARITY = {
    "tokens": 832,
    "steps": 455,
    "events": 5,
    "survivors": 5120,
    "survivor_mismatches": 0,
    "undecidable": 1,
    "greedy_mismatches": 0,
    "max_logit_diff": 1.34e-05,
    "max_logit": 14.1,
}
SPEED = {"decode_ms": 1.46, "steps": 64, "event_ms": 3.02, "entries": 130, "threads": 2, "device": "Some CPU, 2 CPUs"}


def manifest(**changed: Any) -> Manifest:
    """Qwen3-4B's shape with a budget of 1024; ``changed`` replaces sections."""
    sections: dict[str, Any] = dict(
        schema_version=1,
        model=ModelInfo(
            "qwen3-4b",
            "/home/ada/Qwen3-4B",
            "qwen3",
            "ab" * 32,
            False,
            36,
            2560,
            32,
            8,
            128,
            151936,
            4_100_000_000,
            40960,
        ),
        gates=GateInfo("rg10", "/home/ada/gates.safetensors", "cd" * 32, 512),
        cache=CacheConfig(1024, 128, 64, sinks=4),
        rope=RopeInfo(),
        tokenizer=TokenizerInfo(151669, [151645, 151643]),
        dtype="float32",
        quantization="none",
        bytes=ByteInfo(345_000_000, 16_400_000_000, 17_000_000_000),
        targets={
            "executorch": Target("executorch", "xnnpack", {"program": "model.pte"}, PARITY, SPEED),
            "onnx": Target("onnx", "gqa", {"decoder": "decoder.onnx", "evict": "evict.onnx"}, PARITY, SPEED),
        },
        files={"model.pte": FileInfo("12" * 32, 76_800), "chat_template.jinja": FileInfo("34" * 32, 201)},
        tools={"torch": "2.13.0", "executorch": "1.5.1"},
    )
    return Manifest(**{**sections, **changed})


def small_artefact(folder: Path, files: dict[str, bytes] = FILES) -> Manifest:
    """Writes ``files``, a card and a manifest into ``folder``, as an export does at its end."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    made = write_card(replace(manifest(), files=describe_files(folder)), folder)
    made.save(folder)
    return made
