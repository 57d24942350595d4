"""Profiles: sums by hand, and the real profilers of both engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from executorch_artefact import make_executorch
from factories import gated_model
from text_artefact import text_artefact

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine
from trimkv_edge.runtime.profile import OperatorTime, lines, read_onnxruntime, total


def test_calls_are_added_up_and_sorted() -> None:
    rows = total([("Add", 0.25), ("MatMul", 1.0), ("Add", 0.25), ("MatMul", 0.5)])
    assert rows == [OperatorTime("MatMul", 2, 1.5), OperatorTime("Add", 2, 0.5)]
    assert [line.split() for line in lines(rows)] == [
        ["operator", "calls", "ms", "share"],
        ["MatMul", "2", "1500.0", "75.0%"],
        ["Add", "2", "500.0", "25.0%"],
    ]


def test_only_kernels_count(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    events = [
        {"cat": "Session", "name": "model_run", "dur": 900},
        {"cat": "Node", "name": "a_fence_before", "dur": 5, "args": {"op_name": "Add"}},
        {"cat": "Node", "name": "a_kernel_time", "dur": 7, "args": {"op_name": "Add"}},
    ]
    path.write_text(json.dumps(events))
    (row,) = read_onnxruntime(path)
    assert (row.operator, row.calls, round(row.seconds, 9)) == ("Add", 1, 7e-6)
    path.write_text("{")
    with pytest.raises(TrimKVError, match="not an onnxruntime profile"):
        read_onnxruntime(path)


def product_calls(engine: ArtefactEngine, operator: str) -> int:
    for token in range(5, 10):
        engine.decode(token)
    engine.state()
    row = next(row for row in engine.profile_rows() if row.operator == operator)
    assert row.seconds > 0
    with pytest.raises(ConfigError, match="open the engine with profile"):
        engine.profile_rows()
    return row.calls


def test_onnxruntime_counts_its_operators() -> None:
    engine = load_engine(Artefact.load(text_artefact()), "onnx", 1, profile=True)
    # Per layer q, k, v, o, gate, up, down; the output layer. Retention gates have two, and read all tokens at once.
    assert product_calls(engine, "MatMul") == 5 * (2 * 7 + 1) + 2 * 2


def test_executorch_counts_its_operators(tmp_path: Path) -> None:
    made = make_executorch(tmp_path / "a", gated_model("llama-gqa"), CacheConfig(24, 8, 8), "xnnpack")
    engine = ExecuTorchEngine(made.folder, made.manifest, made.target, 1, profile=True)
    assert product_calls(engine, "Fully Connected (NC, F32) GEMM") == 5 * (2 * 7 + 1) + 2 * 2


def test_the_command_prints_the_table() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "trimkv_edge.cli.run", str(text_artefact())),
            *("--prompt", "the cat", "--profile", "--max-new-tokens", "3"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "operator" in done.stderr
    assert "MatMul" in done.stderr
