"""``trimkv-eval`` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimkv_edge.cli.evaluate import main

SMALL = ["--tasks", "multi-query", "text", "--lengths", "300", "--budgets", "64", "--samples", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    main(["--model", "tiny", "--methods", "full", "trimkv:rg", "streaming", *SMALL, "-o", str(folder)])
    return folder


def test_a_sweep_of_the_shipped_model(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The gates answer, a window does not; and a second run measures nothing again."""
    main(["--model", "tiny", "--methods", "full", "trimkv:rg", "streaming", *SMALL, "-o", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("(done before)") for line in lines[:6]] == [True] * 6
    accuracy = {line.split()[4]: float(line.split("accuracy ")[1].split()[0]) for line in lines[:3]}
    assert accuracy["full"] >= 0.9
    assert accuracy["trimkv:rg"] >= 0.9
    assert accuracy["streaming"] <= 0.2
    assert "| 300 | trimkv:rg |" in (results / "tables.md").read_text()
    assert (results / "plots" / "multi-query_budget.png").is_file()


def test_comparison(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-o", str(results), "--compare", "trimkv:rg", "streaming"])
    out = capsys.readouterr().out
    assert "| multi-query | 300 | 64 |" in out
    assert "| better |" in out


def test_report_alone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "tables.md").unlink()
    main(["-o", str(results), "--report", "--no-plots"])
    assert (results / "tables.md").is_file()


def test_list_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list-tasks"])
    out = capsys.readouterr().out
    assert "multi-key       24 facts, 4 of them asked for" in out
    assert len(out.splitlines()) == 11


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of ARTEFACT and --model"),
        (["nowhere", "--model", "tiny"], "give one of ARTEFACT and --model"),
        (["nowhere"], "no artefact at nowhere"),
        (["--model", "nothing"], "known names: tiny"),
        (["--model", "tiny", "--methods", "newest"], "policy 'newest' is not known; use one of trimkv"),
        (["--model", "tiny", "--tasks", "chess"], "task 'chess' is not known; use some of single"),
        (["--model", "tiny", "--budgets", "lots"], "budget 'lots'"),
        (["--model", "tiny", "--engine", "onnx"], "--engine is for an artefact"),
        (["--model", "tiny", "--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (
            ["--model", "tiny", "--tasks", "multi-query", "--lengths", "40"],
            "a stream of 40 tokens cannot hold the task",
        ),
        (["--model", "tiny", "--methods", "trimkv:/nowhere.safetensors"], "/nowhere.safetensors"),
        (["--report", "-o", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if "-o" in arguments else ["-o", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *where, *([] if "--samples" in arguments else ["--samples", "1"])])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
