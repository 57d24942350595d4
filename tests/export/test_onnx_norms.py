"""Residual sums and norms in one operator, against the same graph with both apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from factories import gated_model
from onnx_artefact import make_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.export import onnx as onnx_export

CONFIG = CacheConfig(budget=8, buffer=4, prefill_chunk=4)


def logits(folder: Path, name: str) -> np.ndarray:
    session = ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    feeds = {}
    for given in session.get_inputs():
        shape = [size if isinstance(size, int) else 3 for size in given.shape]
        feeds[given.name] = np.zeros(shape, np.int64 if "int64" in given.type else np.float32)
    feeds["input_ids"][:] = [[5, 17, 200]]
    return np.asarray(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("kind", ["qwen3-gqa", "llama-gqa", "phi3-mha"])
def test_each_sum_is_fused_and_nothing_changes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = make_artefact(tmp_path / "fused", gated_model(kind), CONFIG)
    monkeypatch.setattr(onnx_export, "fuse_skip_norms", lambda model: 0)
    plain = make_artefact(tmp_path / "plain", gated_model(kind), CONFIG)
    operators = Counter(node.op_type for node in onnx.load(fused.folder / "decoder.onnx").graph.node)
    # Two layers of two sums each; only the embedding reaches a norm without one.
    assert operators["SkipSimplifiedLayerNormalization"] == 4
    np.testing.assert_allclose(
        logits(fused.folder, "decoder.onnx"), logits(plain.folder, "decoder.onnx"), rtol=1e-4, atol=1e-5
    )
