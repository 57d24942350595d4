"""Small trainings through the command, shared by tests."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from factories import base_model, random_tokens

LENGTH = 32
ROWS = 13


def write_model(folder: Path, case: str = "qwen3-gqa") -> Path:
    """A small random model on disk."""
    base_model(case).save_pretrained(folder)
    return folder


def ready_rows() -> list[dict[str, Any]]:
    """Rows of 20 to 32 tokens with uneven weights, one of them with a skipped stretch."""
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        ids = random_tokens(20 + number, number)
        rows.append({"input_ids": ids, "weight": [float(1 + (place + number) % 3) for place in range(len(ids))]})
    rows[5]["index"] = [place + 100 * (place >= 10) for place in range(len(rows[5]["input_ids"]))]
    rows[5]["skip"] = [4, 16, 10, 100]
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ready_rows()))
    return path


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    """Arguments of `trimkv-train` for the model and rows in `folder`; later ones win."""
    given = f"--model {folder}/model --data {folder}/rows.jsonl -o {folder}/{output} --memory 4 --length {LENGTH}"
    given += " --steps 5 --lr 1e-2 --intermediate-size 16 --bias-init 2 --log-every 1 --save-every 2"
    return [*given.split(), *more]


def train(args: list[str]) -> str:
    """Runs the command in this process; what it printed."""
    from trimkv_edge.cli.train import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        main(args)
    return shown.getvalue()


def train_loudly(args: list[str], printed: str) -> None:
    """The same, as the work of a process of its own: what it prints goes to a file as it comes."""
    from trimkv_edge.cli.train import main

    with Path(printed).open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        main(args)


def history(output: Path) -> list[dict[str, float]]:
    """The logged steps of a finished run."""
    newest = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "ce" in entry]
