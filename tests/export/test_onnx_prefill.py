"""The two forms of attention over an int8 cache: same numbers, chosen by the chunk's length, written in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from factories import gated_model, random_tokens
from onnx_artefact import make_manifest, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.export import onnx as onnx_export
from trimkv_edge.export.kv_ranges import measure_scales
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.onnx_lint import lint
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.reference import ReferenceWeights, exact
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=40, buffer=20, prefill_chunk=20, kv_dtype="int8")


def engines(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], OnnxEngine]]:
    """With both forms, and with the int8 operator for every length; each call opens the files again."""
    model = spread_gates(gated_model(kind))
    reference = ReferenceWeights(model, model_weights(model), SCHEMES["none"], exact)
    scales = measure_scales(reference, random_tokens(100, seed=8))
    made = []
    for name, longest in (("both", 8), ("direct", 1000)):
        monkeypatch.setattr(onnx_export, "LONGEST_DIRECT", longest)
        target = export_onnx(model, CONFIG, folder / name, scales=scales)
        manifest = make_manifest(model, CONFIG, target)
        made.append(partial(OnnxEngine, folder / name, manifest, target, threads=1))
    return made


@pytest.mark.parametrize("kind", ["qwen3-gqa", "phi3-mha"])
def test_long_chunks_see_the_same_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, direct = (opened() for opened in engines(kind, tmp_path, monkeypatch))
    graphs = [onnx.load(tmp_path / name / "decoder.onnx") for name in ("both", "direct")]
    assert [sum(node.op_type == "If" for node in graph.graph.node) for graph in graphs] == [2, 0]
    assert not lint(graphs[0])
    tokens, start, flips = random_tokens(400, seed=3), 0, 0
    # 20 and 13 take the long form, 7 and 1 the direct one; a chunk may begin anywhere in the ring.
    for size in (20, 7, 13, 20, 1, 19, 13, 7, 20) * 2:
        size = min(size, both.room)
        want, got = (engine.prefill(tokens[start : start + size]) for engine in (direct, both))
        assert np.abs(want - got).max() < 0.02 * np.abs(want).max()
        assert want.argmax() == got.argmax()
        start += size
        if both.room == 0:
            both.evict()
            direct.evict()
            np.testing.assert_array_equal(both.survivors(), direct.survivors())
    for name in ("0.key", "0.value", "1.key", "1.value"):
        # A number between two levels goes up or down with the last bit of float32, and never further.
        apart = both._arrays[name].astype(int) - direct._arrays[name].astype(int)
        assert np.abs(apart).max() <= 1
        flips += np.count_nonzero(apart)
    assert flips <= 0.01 * 4 * both._arrays["0.key"].size


def test_the_choice_is_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, _ = engines("phi3-mha", tmp_path, monkeypatch)
    whole = opened()
    path = tmp_path / "both" / "decoder.onnx"
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type == "If":
            long = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
            scale = next(
                inner for inner in long.node if inner.op_type == "Mul" and inner.output[0] == long.output[0].name
            )
            scale.input[1] = scale.input[0]  # breaks the long form only
    onnx.save(graph, path)
    broken = opened()
    tokens = random_tokens(17)
    assert np.array_equal(whole.prefill(tokens[:8]), broken.prefill(tokens[:8]))
    assert not np.allclose(whole.prefill(tokens[8:]), broken.prefill(tokens[8:]), atol=1e-3)


def test_short_chunks_need_no_second_form(tmp_path: Path) -> None:
    model = gated_model("phi3-mha")
    reference = ReferenceWeights(model, model_weights(model), SCHEMES["none"], exact)
    config = CacheConfig(budget=24, buffer=8, prefill_chunk=8, kv_dtype="int8")
    export_onnx(model, config, tmp_path, scales=measure_scales(reference, random_tokens(40)))
    assert not [node for node in onnx.load(tmp_path / "decoder.onnx").graph.node if node.op_type == "If"]
