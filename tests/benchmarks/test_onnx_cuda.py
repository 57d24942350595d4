"""The benchmark of ONNX Runtime on CUDA: what it says without a GPU, and that its code runs."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import onnx_cuda
from cuda_artefact import cuda_artefact

from trimkv_edge.runtime.engines.cuda_check import CUDA
from trimkv_edge.runtime.engines.onnx import OnnxEngine

NO_CUDA = CUDA not in onnxruntime.get_available_providers()


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime-gpu is installed")
def test_without_cuda_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        onnx_cuda.main(["--output", str(tmp_path / "out.json")])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: this measures CUDA: the onnxruntime ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_greedy_tokens_cross_events() -> None:
    made = cuda_artefact("float32")
    engine = OnnxEngine(made.folder, made.manifest, made.target, 1)
    prompt = list(range(20))
    got = onnx_cuda.greedy(engine, prompt, 30)
    # By hand: one token at a time, an event whenever the cache is full.
    other = OnnxEngine(made.folder, made.manifest, made.target, 1)
    stream, want = list(prompt), []
    for at in range(20 + 30 - 1):
        if other.live == 16:
            other.evict()
        logits = other.decode(stream[at])
        if at >= 19:
            want.append(int(logits.argmax()))
            stream.append(want[-1])
    assert got == want
    assert other.seen == engine.seen == 49


def test_it_runs_on_the_cpu_and_stores_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx_cuda.main(["--smoke", "--budget", "32", "--output", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "tiny standard: 24 of 24 greedy tokens are those of the CPU" in out
    assert "tiny fp16: 24 of 24 greedy tokens are those of the CPU" in out
    assert "'onnx:cuda without CUDA graphs': {'ms_per_token'" in out
    assert out.endswith("nothing was stored: this ran on the CPU\n")
    assert list(tmp_path.iterdir()) == []
