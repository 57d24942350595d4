"""What does not need Qualcomm's package: scales of 4-bit weights, and streams to calibrate on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from factories import gated_model, random_tokens
from host_artefact import make_host
from onnx_artefact import feed, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.hexagon_quantize import Float, int4_scales, measure, stream
from trimkv_edge.host_constants import load_constants


def error(values: list[float], scale: float) -> float:
    return sum((min(7, max(-8, round(value / scale))) * scale - value) ** 2 for value in values)


def test_int4_scales_have_the_smallest_square_error() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((40, 6)).astype(np.float32)
    weight[:, 5] = 0
    weight[0, 4] = 6  # cut off, so that the others are finer
    scales = int4_scales(weight)
    for channel, scale in enumerate(scales[:5]):
        values = weight[:, channel].tolist()
        whole = max(abs(value) for value in values) / 7
        assert 0.5 * whole <= scale * (1 + 1e-6)
        assert scale <= whole * (1 + 1e-6)
        others = [error(values, whole * share) for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        assert error(values, float(scale)) <= min(others) * (1 + 1e-4)
    assert scales[5] > 0
    assert int4_scales(np.array([[-0.7], [0.7], [0.1], [-0.4]], np.float32)).tolist() == [np.float32(0.1)]


def small(folder: Path) -> Float:
    config = CacheConfig(24, 8, 8)
    make_host(folder, spread_gates(gated_model("llama-gqa")), config)
    constants = load_constants(folder / "host.json")
    embedding = np.fromfile(folder / "host_embedding.bin", "<f4").reshape(320, -1)
    graphs = {1: folder / "host_decode.onnx", 8: folder / "host_prefill.onnx"}
    return Float(graphs, config, embedding, constants.rotary, -30.0)


def test_calibration_reads_what_the_engine_reads(tmp_path: Path) -> None:
    model = small(tmp_path)
    tokens = random_tokens(120)
    chunks: list[int] = []
    last = {}
    for chunk, inputs in stream(model, tokens):
        chunks.append(chunk)
        assert set(np.unique(inputs["mask"]).tolist()) <= {0.0, -30.0}
        last = {name: array.copy() for name, array in inputs.items()}
    assert {1, 8} == set(chunks)
    # The same stream through the engine of the eager model: what the last step saw of the cache.
    from trimkv_edge.models.eager import EagerEngine

    eager = EagerEngine(spread_gates(gated_model("llama-gqa")), model.config)
    feed(eager, tokens[: len(tokens) - 1], (8,))
    live = int((last["mask"][0, 0, -1, : model.config.slots] == 0).sum())
    if live == eager.live:
        np.testing.assert_allclose(last["past.0.key"][0, :, :live], eager.state().key[0, :, :live], atol=1e-4)


def test_ranges_are_common_to_graphs_and_to_the_cache(tmp_path: Path) -> None:
    model = small(tmp_path)
    tokens = random_tokens(100)
    ranges = measure(model, tokens, tmp_path)
    rows = {"past.0.key": [], "past.1.value": [], "hidden": []}  # type: ignore[var-annotated]
    for _, inputs in stream(model, tokens):
        for name, found in rows.items():
            found += [float(inputs[name].min()), float(inputs[name].max())]
    for name, found in rows.items():
        for chunk in (1, 8):
            low, high = ranges[chunk][name]
            assert low <= min(found)
            assert high >= max(found)
    ends = {name for name in ranges[1] if name.startswith(("past.", "new.", "gate."))}
    for name in ends | {"hidden", "cos", "sin", "mask", "logits"}:
        assert ranges[1][name] == ranges[8][name]
    assert ranges[1]["past.0.key"] == ranges[1]["new.0.key"]
    assert ranges[8]["past.1.value"] == ranges[8]["new.1.value"]


def test_without_the_package_there_is_one_line() -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; sys.modules['onnxruntime_qnn'] = None\n"
        "from trimkv_edge.cli.common import run_cli\n"
        "from trimkv_edge.runtime.engines.qnn_emulator import qairt_version\nrun_cli(qairt_version)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the qnn-emulator engine needs onnxruntime-qnn")
    assert "pip install 'trimkv-edge[hexagon]'" in done.stderr
    assert done.stderr.count("\n") == 1
