"""The benchmark that compares all engines over one stream: what it counts, and that its two readers read alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from engines_agree import CASES, SCRIPT, Made, compare, from_json, read, stored_rows
from tiny_host import tiny_host
from web_example import need_packages

from trimkv_edge.export.targets import TARGETS
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines import load_engine


def made(kept: list[list[list[int]]], greedy: list[int]) -> Made:
    return Made(np.array(kept), np.array(greedy))


def test_survivors_are_counted_in_any_order_and_greedy_tokens_in_theirs() -> None:
    want = made([[[1, 2, 3], [4, 5, 6]], [[1, 5, 9], [4, 8, 7]]], [3, 1, 2, 2])
    got = made([[[3, 1, 2], [4, 5, 7]], [[1, 5, 9], [1, 2, 3]]], [3, 2, 1, 2])
    assert compare(want, got) == {"survivors": 12, "survivors_same": 8, "greedy": 4, "greedy_same": 2}
    assert compare(want, want) == {"survivors": 12, "survivors_same": 12, "greedy": 4, "greedy_same": 4}


@pytest.mark.parametrize("got", [made([[[1, 2]]], [1, 2]), made([[[1, 2]], [[1, 2]]], [1])])
def test_another_number_of_events_or_calls_is_an_error(got: Made) -> None:
    with pytest.raises(ValueError, match="but the reference has"):
        compare(made([[[1, 2]]], [1]), got)


def test_a_reference_is_known_by_what_it_kept_and_said() -> None:
    one = made([[[1, 2]]], [5])
    assert one.digest() == made([[[2, 1]]], [5]).digest()
    assert len({one.digest(), made([[[1, 3]]], [5]).digest(), made([[[1, 2]]], [6]).digest()}) == 3


def test_rows_of_another_reference_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert stored_rows(path, "a") == []
    path.write_text(json.dumps({"results": {"reference": {"sha256": "a"}, "rows": [{"engine": "onnx"}]}}))
    assert stored_rows(path, "a") == [{"engine": "onnx"}]
    with pytest.raises(SystemExit, match="another reference"):
        stored_rows(path, "b")


def test_cases_are_targets_that_run() -> None:
    for name, case in CASES.items():
        assert TARGETS[case.target].runs, name
        assert case.ops in TARGETS[case.target].ops, name
    assert {case.target for case in CASES.values()} == {name for name, spec in TARGETS.items() if spec.runs}


def test_python_and_javascript_read_alike(tmp_path: Path) -> None:
    need_packages()
    text = np.random.default_rng(0).integers(3, 500, 240).tolist()
    want = read(load_engine(Artefact.load(tiny_host())), text)
    # 128 slots in chunks of 24, the last one 8; then 112 single tokens, an event for each 32.
    assert (len(want.greedy), len(want.kept)) == (6 + 112, 1 + 112 // 32)
    stream = tmp_path / "stream.json"
    stream.write_text(json.dumps(text))
    done = subprocess.run(
        ["node", str(SCRIPT), str(tiny_host()), str(stream)], check=True, capture_output=True, text=True, timeout=300
    )
    assert compare(want, from_json(json.loads(done.stdout)))["survivors_same"] == want.kept.size
    assert from_json(json.loads(done.stdout)).greedy.tolist() == want.greedy.tolist()
