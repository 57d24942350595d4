"""Exports a small random model to ONNX and opens it, shared by tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from factories import random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine, FloatArray
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.manifest import ByteInfo, GateInfo, Manifest, ModelInfo, RopeInfo, Target
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.onnx import OnnxEngine


@dataclass
class Artefact:
    """An exported model beside the eager one it was made from."""

    folder: Path
    model: GatedModel
    manifest: Manifest
    target: Target

    def eager(self) -> EagerEngine:
        return EagerEngine(self.model, self.manifest.cache)

    def onnx(self, *, aliased: bool = True) -> OnnxEngine:
        return OnnxEngine(self.folder, self.manifest, self.target, threads=1, aliased=aliased)


def make_artefact(folder: Path, model: GatedModel, config: CacheConfig, ops: str = "gqa") -> Artefact:
    """Exports ``model`` into ``folder``."""
    target = export_onnx(model, config, folder, ops=ops)
    return Artefact(folder, model, make_manifest(model, config, target), target)


def make_manifest(model: GatedModel, config: CacheConfig, target: Target) -> Manifest:
    """As much of a manifest as an engine reads."""
    shape = model.config
    info = ModelInfo(
        "test",
        "random",
        shape.model_type,
        "",
        True,
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        model.head_dim,
        shape.vocab_size,
        0,
        shape.max_position_embeddings,
    )
    gates = GateInfo(str(model.gates[0].kind), "random", "", 0)
    empty = ByteInfo(0, 0, 0)
    return Manifest(1, info, gates, config, RopeInfo(), None, "float32", "none", empty, {"onnx": target}, {}, {})


def feed(engine: Engine, tokens: Sequence[int], sizes: Sequence[int]) -> list[FloatArray]:
    """Reads ``tokens`` in chunks of the given lengths (repeated), cut at event boundaries; logits after each chunk."""
    out: list[FloatArray] = []
    start, turn = 0, 0
    while start < len(tokens):
        if engine.room == 0:
            engine.evict()
        count = min(sizes[turn % len(sizes)], engine.room, len(tokens) - start)
        out.append(engine.prefill(tokens[start : start + count]))
        start, turn = start + count, turn + 1
    return out


def spread_gates(model: GatedModel, seed: int = 0) -> GatedModel:
    """Makes random gates decide: log-betas from near 0 to far below, differently per head."""
    generator = torch.Generator().manual_seed(seed)
    for gate in model.gates:
        for name, parameter in gate.named_parameters():
            if name.endswith("weight"):
                spread = 1.5 * parameter.shape[1] ** -0.5
                parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        gate.bias.data = torch.linspace(2.0, 4.0, gate.bias.shape[0])
    return model


def same(one: Sequence[FloatArray], other: Sequence[FloatArray]) -> bool:
    """Bit-equal logits."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def check_another(make: Callable[[], ArtefactEngine]) -> None:
    """``another()``: two streams in turns, one of them after a reset, are each as alone in an engine of its own."""
    one = make()
    streams = random_tokens(61, seed=1), random_tokens(53, seed=2)
    feed(one, random_tokens(17), (1,))
    other = one.another()
    one.reset()
    got: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    for start in range(0, 61, 5):
        for engine, tokens, out in zip((one, other), streams, got, strict=True):
            out.extend(feed(engine, tokens[start : start + 5], (1,)))
    for tokens, out in zip(streams, got, strict=True):
        assert same(out, feed(make(), tokens, (1,)))
        assert len(out) == len(tokens)
