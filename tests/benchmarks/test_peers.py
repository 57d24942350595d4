"""What the comparison with other tools does with its samples, its weights and its workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.append(str(PEERS))

import host  # noqa: E402
import plan  # noqa: E402
import table  # noqa: E402
from registry import PEERS as ROWS  # noqa: E402
from shapes import SHAPES  # noqa: E402
from tensors import bfloat16_tensors, read_tensor  # noqa: E402

WORKER = """
import numpy as np, protocol
class Model(protocol.Model):
    vocabulary, steps_per_event = 7, 4
    def __init__(self, folder, threads, length, options):
        super().__init__()
        print("a library's notice on stdout")
        self.read, self.factor = [], int(options["factor"])
    def reset(self): self.read = []
    def feed(self, tokens):
        self.read += tokens
        self.event_seconds.append(0.5)
    def step(self):
        if len(self.read) > 90: raise SystemExit("the cache is full")
        token = len(self.read) * self.factor % 7
        self.read.append(token)
        return token
    def logits(self): return np.arange(7.0)
protocol.run(None, Model)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[host.Worker]:
    script = tmp_path / "worker.py"
    script.write_text(f"import sys; sys.path.append({str(PEERS)!r})\n{WORKER}")
    command = [sys.executable, script, "serve", "--folder", ".", "--threads", "1", "--length", "9", "--option=factor=3"]
    with host.Worker(command, tmp_path / "log") as started:
        yield started


def test_a_worker_answers_and_counts_its_stream(worker: host.Worker) -> None:
    assert worker.loaded["load_s"] >= 0
    assert worker.ask("prefill", to=20)["tokens"] == 20
    assert len(worker.ask("decode", steps=4)["seconds"]) == 4
    assert worker.ask("prefill", to=30)["tokens"] == 6  # 20 read and 4 decoded before
    assert worker.ask("events") == {"seconds": [0.5, 0.5], "steps_per_event": 4}
    checked = worker.ask("check", prompt=[5, 6], steps=3)
    assert checked == {"logits": [0, 1, 2, 3, 4, 5, 6], "greedy": [6, 2, 5]}  # 2*3, 3*3, 4*3 modulo 7
    assert worker.ask("events")["seconds"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads process states as Linux gives them")
def test_a_worker_is_stopped_between_requests(worker: host.Worker) -> None:
    process = psutil.Process(worker._process.pid)
    for _ in range(2):
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.status() == psutil.STATUS_STOPPED
        worker.ask("memory")


def test_a_worker_that_ends_says_why(worker: host.Worker) -> None:
    worker.ask("prefill", to=91)
    with pytest.raises(host.WorkerError, match=r"exit code 1.*the cache is full"):
        worker.ask("decode", steps=1)


def test_a_worker_that_is_killed_is_an_error(worker: host.Worker) -> None:
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(host.WorkerError, match="signal 9"):
        worker.ask("memory")


def test_a_step_pays_its_share_of_an_event() -> None:
    windows = [[0.001, 0.002, 0.009], [0.004, 0.004, 0.004]]
    assert table.step_ms(windows, [], None) == [2.0, 4.0]
    assert table.step_ms(windows, [0.128, 0.064, 0.256], 128) == pytest.approx([3.0, 5.0])


def test_ratios_are_taken_within_a_turn() -> None:
    # The machine was twice as slow in the second turn: medians of each alone would say 1.5.
    assert table.ratio([2.0, 8.0, 3.0], [1.0, 4.0, 2.0]) == 2.0
    assert table.ratio([2.0, 8.0], [1.0]) is None
    assert table.ratio([], []) is None


def test_agreement_of_logits_and_tokens() -> None:
    reference = {"logits": [3.0, 4.0, 0.0], "greedy": [7, 8, 9]}
    same = table.agreement([6.0, 8.0, 0.0], [7, 8, 1], reference)
    assert same == {"cosine": pytest.approx(1.0), "max_difference": 4.0, "same_greedy": 2}
    assert table.problem(same, "float32", "float32") == ""
    other = table.agreement([4.0, 3.0, 0.0], [7, 8, 9], reference)  # 24 / 25
    assert other["cosine"] == pytest.approx(0.96)
    assert other["same_greedy"] == 3
    assert table.problem(other, "int4", "float32") == ""
    assert "0.9600" in table.problem(other, "bfloat16", "float32")
    assert "0.9600" in table.problem(other, "float32", "bfloat16")
    turned = table.agreement([4.0, -3.0, 0.0], [7, 8, 9], reference)
    assert "0.0000" in table.problem(turned, "int4", "float32")
    assert table.problem(table.agreement([float("nan")] * 3, [7, 8, 9], reference), "int4", "float32")


def test_the_table_has_a_row_for_a_missing_peer() -> None:
    cell = {"decode_ms": 12.345, "decode_ratio": 1.5, "prefill_tokens_per_s": 1234.5, "prefill_ratio": None}
    row = {"weights": "int4", "cache": "float32", "file_bytes": 3 * 2**20, "load_s": 0.26, "peak_rss": 5 * 2**20}
    rows = {
        "ours": row | {"check": {"cosine": 0.99}, "contexts": {"256": cell}},
        "other": {"missing": "not installed: run this"},
    }
    lines = table.render(rows, [256, 1024]).splitlines()
    assert "| ours | int4 | float32 | 3 | 0.3 | 5 | 0.9900 | 12.35 (1.50) | - |" in lines
    assert "| other | - | - | - | - | - | - | - | - |" in lines
    assert "| ours | 1,234 | - |" in lines
    assert lines[-1] == "- other: not installed: run this"


def test_groups_fit_into_memory() -> None:
    sizes = {"ours": 3, "a": 4, "b": 5, "c": 9}
    assert plan.groups(sizes, "ours", 21) == [["ours", "a", "b", "c"]]
    assert plan.groups(sizes, "ours", 10) == [["ours", "a"], ["ours", "b"], ["c"]]
    assert plan.groups({"a": 4, "b": 5}, "ours", 8) == [["a"], ["b"]]
    assert plan.groups({"ours": 4}, "ours", 3) == [["ours"]]
    assert plan.groups({}, "ours", 3) == []


def test_contexts_that_fit() -> None:
    needed = plan.Need(fixed=1000, per_token=2)
    assert plan.fitting(needed, [256, 1024, 4096], 1000 + 2 * (1024 + plan.STEPS)) == [256, 1024]
    # Phi-3-mini: 384 KiB of float16 keys and values for a token; ours has a fixed cache.
    shape = SHAPES["phi3-mini"]
    assert plan.need(ROWS["llama.cpp"], shape, 10**9, "int4").per_token == 384 * 1024
    assert plan.need(ROWS["ours-onnx"], shape, 10**9, "int4").per_token == 0


def test_a_build_must_be_as_small_as_its_scheme() -> None:
    shape = SHAPES["phi3-54m"]
    assert plan.not_quantised(58 * 10**6, shape, "int4") == ""  # 4-bit matrices, float32 embedding
    assert "4.3 bytes per parameter, so it is not int4" in plan.not_quantised(233 * 10**6, shape, "int4")
    assert plan.not_quantised(233 * 10**6, shape, "none") == ""


def test_shapes_have_the_published_sizes() -> None:
    assert SHAPES["phi3-mini"].parameters == 3_821_079_552
    assert SHAPES["phi3-54m"].parameters == 54_010_880


def test_bfloat16_is_read_without_torch(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.0, -2.5, 3.140625], [0.0, 1e-30, -7e30]]).bfloat16()
    save_file({"x": torch.ones(5).bfloat16(), "y": tensor}, tmp_path / "model.safetensors")
    read = read_tensor(*bfloat16_tensors(tmp_path)["y"])
    np.testing.assert_array_equal(read, tensor.float().numpy())
    save_file({"x": torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="F32"):
        bfloat16_tensors(tmp_path)
