"""What the benchmark of slices makes of its measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from npu_slices import extrapolate, store, table, watch, write_slice

from trimkv_edge.models.source import find_source


def row(seconds: float, memory: int, **sizes: int) -> dict[str, Any]:
    return {"compile_cpu_s": seconds, "peak_rss_bytes": memory, "bytes": sizes}


def test_thirty_two_layers_are_the_first_and_thirty_one_times_what_the_second_added() -> None:
    found = extrapolate({"2": row(13.0, 900, a=70, b=50), "1": row(10.0, 500, a=50, b=50)})
    assert found == {"compile_cpu_s": 103, "peak_rss_bytes": 500 + 31 * 400, "bytes": 100 + 31 * 20}


def test_slices_that_failed_give_no_estimate() -> None:
    assert extrapolate({"1": row(10.0, 500, a=1), "2": {"error": "stopped", "peak_rss_bytes": 9}}) == {}
    assert extrapolate({"1": row(10.0, 1, a=1), "2": {"error": ""}, "4": row(16.0, 7, a=1)})["compile_cpu_s"] == 72


def test_rows_of_other_settings_and_other_slices_stay(tmp_path: Path) -> None:
    output = tmp_path / "slices.json"
    key = {"target": "tosa", "precision": "fp32", "budget": 2048, "buffer": 128}
    store(output, {**key, "slices": {"1": row(1.0, 10, a=1)}})
    store(output, {**key, "precision": "int8", "slices": {"1": row(5.0, 50, a=5)}})
    store(output, {**key, "slices": {"2": row(2.0, 11, a=2)}})
    store(output, {**key, "slices": {"1": row(1.5, 10, a=1)}})
    rows = json.loads(output.read_text())["results"]
    assert [(one["precision"], list(one["slices"])) for one in rows] == [("fp32", ["1", "2"]), ("int8", ["1"])]
    assert rows[0]["slices"]["1"]["compile_cpu_s"] == 1.5
    assert rows[0]["layers_32"] == {"compile_cpu_s": 17, "peak_rss_bytes": 41, "bytes": 32}
    assert [path.name for path in tmp_path.iterdir()] == ["slices.json"]


def test_the_table_tells_cut_and_failed_graphs() -> None:
    one = {**row(12.4, 2**30, a=2**31), "partitions": {"decode": 1, "prefill": 1}}
    key = {"target": "tosa", "precision": "fp32"}
    rows = [
        {**key, "slices": {"1": one, "2": one}, "layers_32": {"compile_cpu_s": 1234, "peak_rss_bytes": 0, "bytes": 0}},
        {
            **key,
            "slices": {"1": {**one, "partitions": {"decode": 2}}, "2": {"error": "out of memory"}},
            "layers_32": {},
        },
        {**key, "slices": {"2": row(1.0, 0, a=0)}, "layers_32": {}},
    ]
    cells = [line.split(" | ")[2:] for line in table(rows).splitlines()[2:]]
    cost = "12 s, 1.0 GiB, files 2.0 GiB"
    assert cells[0] == ["yes", cost, cost, "1,234 s, 0.0 GiB, files 0.0 GiB |"]
    assert cells[1] == ["no", cost, "failed: out of memory", "- |"]
    assert cells[2] == ["-", "-", "1 s, 0.0 GiB, files 0.0 GiB", "- |"]


def test_a_slice_is_the_model_with_fewer_layers(tmp_path: Path) -> None:
    config = find_source("phi-3-mini", write_slice(tmp_path, 2), random_weights=True).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 3072, 32)
    assert (config.num_key_value_heads, config.vocab_size, config.intermediate_size) == (32, 32064, 8192)


@pytest.mark.parametrize(("limit", "stopped"), [(2**26, True), (2**31, False)])
def test_a_process_that_takes_too_much_is_stopped(limit: int, stopped: bool) -> None:
    command = [sys.executable, "-c", "import time; held = b'1' * 2**27; time.sleep(1.5)"]
    with subprocess.Popen(command) as process:
        peak, over = watch(process.pid, limit)
        assert over == stopped
        assert peak > min(limit, 2**27)
        assert (process.wait() == 0) != stopped
