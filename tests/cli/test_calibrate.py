"""``trimkv-calibrate`` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimkv_edge.caps import load_calibration
from trimkv_edge.cli.calibrate import main

SMALL = ["--model", "tiny", "--budget", "32", "--buffer", "16", "--streams", "2", "--tokens", "512"]


def test_caps_a_table_and_a_heat_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "caps.json"
    main([*SMALL, "--target", "95%", "-o", str(output)])
    out = capsys.readouterr().out
    found = load_calibration(output)
    caps = found.cache.caps
    assert caps is not None
    assert found.agreement >= found.target == 0.95
    assert (found.tokens, found.held_out_tokens) == (1024, 512)
    assert "gates rg10" in out
    rows = [line for line in out.splitlines() if line.endswith("%") and "run with" not in line]
    assert len(rows) == len(found.trade)
    chosen = [row.split() for row in rows if "->" in row]
    assert len(chosen) == 1
    assert chosen[0][-5] == str(sum(map(sum, caps)))
    # The exact policy's cache: 8 heads x 48 slots of 2 x 64 floats and a log-beta, and 32 positions each.
    size = 8 * (48 * (2 * 64 * 4 + 4) + 32 * 8)
    for row, point in zip(rows, found.trade, strict=True):
        assert float(row.split()[-3]) == pytest.approx(point.bytes / size, abs=0.006)
    assert f"written   {output}" in out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in output.parent.iterdir()) == ["caps.json", "caps.png"]


def test_own_text_and_other_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {number} says {number * number}." for number in range(700)))
    output = tmp_path / "caps.json"
    main([*SMALL, "--text", str(text), "--gates", "rg", "--target", "0.8", "--no-heat-map", "-o", str(output)])
    assert "gates rg (" in capsys.readouterr().out
    assert load_calibration(output).text == "text.txt"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["caps.json", "text.txt"]


def test_files_that_exist_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("caps.json", "caps.png"):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(SystemExit) as ended:
            main([*SMALL, "-o", str(tmp_path / "caps.json")])
        assert ended.value.code == 2
        assert f"{path} exists: give --force" in capsys.readouterr().err
        assert path.read_text() == "mine"
        path.unlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "trimkv"], "policy trimkv gives every head the same budget, so it needs no caps"),
        (["--policy", "nothing"], "policy 'nothing' is not known"),
        (["--min-per-head", "33"], "min per head 33 needs more entries than the budget of 32"),
        (["--threshold", "1"], "threshold is 1.0"),
        (["--target", "most"], "--target 'most' is not a share: give one like 99% or 0.99"),
        (["--target", "101%"], "target is 1.01, but must be above 0 and at most 1"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
        (["--gates", "none"], "policy global ranks by retention gates"),
        (["--tokens", "40"], "a stream of 40 tokens cannot hold the task"),
        (["--streams", "0"], "count of streams is 0"),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
        (["--text", "{here}"], "holds no .txt or .jsonl files"),
        (["--text", "{here}/few.txt"], "tokens, but 2 + 1 held-out streams of 512 take 1536: give more --text"),
        (["-o", "{here}"], "is a folder: name a file"),
        (["-o", "{here}/caps.png"], "--output and the heat map are both"),
        (["--no-heat-map", "--heat-map", "x.png"], "contradict each other"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "few" in arguments[-1]:
        (tmp_path / "few.txt").write_text("A few words.")
    before = list(tmp_path.iterdir())
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    where = [] if "-o" in arguments else ["-o", str(tmp_path / "caps.json")]
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, *where, *arguments])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == before


def test_a_threshold_needs_a_ceiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "tiny", "--threshold", "0.1", "-o", str(tmp_path / "caps.json")])
    assert ended.value.code == 2
    assert "threshold with no ceiling: give --budget" in capsys.readouterr().err
