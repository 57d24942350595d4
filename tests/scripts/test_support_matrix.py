"""Tables of README.md and docs/npu.md: as the registry and the measurements say, and made only from them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import support_matrix
from support_matrix import (
    agreement,
    agreement_in_short,
    command,
    matrix,
    percent,
    results,
    survivors,
    with_table,
    written,
)

from trimkv_edge.export.backends import BACKENDS, HOSTS, UNSUPPORTED
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.runtime.engines import ENGINES


@pytest.mark.parametrize("path", written(), ids=lambda path: path.name)
def test_the_files_are_as_the_registry_and_the_measurements_say(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == written()[path], "run python scripts/support_matrix.py"


def cells(table: str) -> dict[str, list[str]]:
    """Cells of each line by its first."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]
    return {line[0].strip("`"): line[1:] for line in lines}


def test_each_target_has_a_line_and_says_never_unless_it_ran_on_its_device() -> None:
    found = cells(matrix({}))
    assert set(found) == set(TARGETS) | set(HOSTS)
    ran = {name for name, line in found.items() if "never" not in line[5]}
    assert ran == {"onnx", "executorch", "torch", "host-evicted", "web", "litert"}
    assert all("Linux x86-64" in found[name][5] for name in ran)


def test_a_model_of_a_device_is_told_from_the_device() -> None:
    found = cells(matrix({}))
    assert {name for name, line in found.items() if line[4].startswith("simulated: ")} >= {"npu:hexagon", "tosa"}
    assert all(line[0] for line in found.values()), "what is a target for?"
    for name, backend in BACKENDS.items():
        assert not (backend.ran.simulates and backend.ran.device), name
        assert not backend.runs or backend.ran.here, name


def test_what_a_line_says_of_precisions_and_survivors() -> None:
    found = cells(matrix({("onnx", "gqa"): 1.0, ("npu:hexagon", "fp16"): 0.99725, ("web", "rows"): 0.999999}))
    assert found["onnx"][1] == "`gqa` 100, `standard` -"
    assert found["npu:hexagon"][1].startswith("`fp16` 99.72, `a16w8` -")
    assert found["web"][1] == "`rows` 99.99"
    assert found["host-evicted"][1] == "`rows` -"


@pytest.mark.parametrize(
    ("share", "told"), [(1, "100"), (0.999999, "99.99"), (0.99996, "99.99"), (0.96073, "96.07"), (0, "0.00")]
)
def test_only_all_is_a_hundred(share: float, told: str) -> None:
    assert percent(share) == told


def test_the_best_of_each_precision_and_accuracy_before_agreement() -> None:
    accuracy: list[dict[str, Any]] = [
        {"target": "tosa", "precision": "int8", "survivors_own": 0.5},
        {"target": "tosa", "precision": "int8", "survivors_own": 0.7},
        {"target": "tosa", "precision": "int8", "survivors_own": 0.6},
    ]
    agreed = [
        {"engine": engine, "target": target, "precision": ops, "survivors": 8, "survivors_same": same}
        for engine, target, ops, same in (
            ("tosa-int8", "tosa", "int8", 8),
            ("host-evicted", "host-evicted", "rows", 6),
            ("node", "host-evicted", "rows", 4),
            ("chromium", "host-evicted", "rows", 2),
        )
    ]
    assert survivors(accuracy, agreed) == {
        ("tosa", "int8"): 0.7,
        ("host-evicted", "rows"): 0.75,
        ("web", "rows"): 0.5,
    }


@pytest.mark.parametrize(
    ("name", "engine"),
    [("onnx", "onnx"), ("npu:hexagon", "qnn-emulator"), ("tosa", "tosa"), ("vulkan", None), ("npu:coreml", None)],
)
def test_the_command_runs_what_an_engine_runs(name: str, engine: str | None) -> None:
    assert command(name).startswith(f"trimkv-export --model tiny --target {name} -o ")
    found = re.findall(r"--engine (\S+)", command(name))
    assert found == ([engine] if engine else [])
    assert set(found) <= set(ENGINES)


def test_names_without_a_compiler_are_told() -> None:
    told = support_matrix.unsupported()
    assert all(f"`{name}`" in told for name in UNSUPPORTED)


def test_a_table_of_engines() -> None:
    row = {
        "where": "a place",
        "target": "tosa",
        "precision": "fp32",
        "survivors": 2000,
        "survivors_same": 1999,
        "greedy": 1000,
        "greedy_same": 1000,
        "versions": {"one": "1.0", "two": "2.0"},
    }
    last = agreement({"reference": {"torch": "9.9"}, "rows": [row]}).split("\n")[2:]
    assert last == [
        "| eager, CPU | the float32 model | reference | reference | torch 9.9 |",
        "| a place | `tosa`, `fp32` | 1,999 of 2,000 (99.95 %) | all 1,000 | one 1.0, two 2.0 |",
    ]


def test_agreement_in_a_sentence() -> None:
    def row(precision: str, survivors: int, greedy: int) -> dict[str, Any]:
        counts = {"survivors": 1000, "survivors_same": survivors, "greedy": 100, "greedy_same": greedy}
        return {"where": "a place", "precision": precision, **counts}

    reference = {"tokens": 2000, "events": 55}
    rows = [row("a", 1000, 100), row("b", 1000, 99), row("c", 900, 100), row("d", 950, 90)]
    told = agreement_in_short({"reference": reference, "rows": rows})
    assert "2,000 tokens and 55 events, 1 of 4 engines" in told
    assert "the furthest, a place with `c`, shares 90.00 % of the entries and 100 % of the tokens (" in told
    assert "furthest" not in agreement_in_short({"reference": reference, "rows": rows[:1]})


def test_every_engine_is_in_the_measurements_of_one_stream() -> None:
    found = results("engines_agree")
    assert {row["target"] for row in found["rows"]} == {name for name, spec in TARGETS.items() if spec.runs}
    assert {"node", "chromium"} <= {row["engine"] for row in found["rows"]}
    assert found["reference"]["tokens"] == 2000


def test_what_is_around_a_table_stays() -> None:
    begin, end = "<!-- x: made by scripts/support_matrix.py -->", "<!-- end of x -->"
    assert with_table(f"a\n{begin}\n\nold\n\n{end}\nb", "x", "new") == f"a\n{begin}\n\nnew\n\n{end}\nb"
    for broken in ("no comments", f"{begin}\n\n", f"\n\n{end}\n{begin}\n\n", f"{begin}\n\n{begin}\n\n\n{end}"):
        with pytest.raises(ValueError, match="comments around the table 'x'"):
            with_table(broken, "x", "new")
