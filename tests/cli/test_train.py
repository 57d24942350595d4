"""``trimkv-train`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import arguments, train, write_model, write_rows

from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    write_model(made / "model")
    write_rows(made / "rows.jsonl")
    return made


def test_help_teaches() -> None:
    command = [sys.executable, "-m", "trimkv_edge.cli.train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for part in (
        "accelerate launch --num_processes 4",
        "--num_machines 2",
        "--fsdp",
        '{"messages": [...]}',
        "--resume",
    ):
        assert part in shown


def test_dry_run_says_what_will_be_trained_and_writes_nothing(folder: Path) -> None:
    shown = train(arguments(folder, "dry", "--dry-run", "--rows", "2", "--accumulation", "3"))
    # rg gates of width 16 on hidden 64 with 2 KV heads: 2 layers of 64 x 16 + 16 + 16 x 2 + 2.
    assert "rg, width 16: 2,148 trained parameters; budget 4 per head, capacity head (paper)" in shown
    assert "13 rows (rows), 338 tokens; 32 tokens per row" in shown
    assert "5 of 6 rows = 192 tokens (2 per pass x 3 passes x 1 processes): 2.3 times through the data" in shown
    assert "memory    about" in shown
    assert not (folder / "dry").exists()


def test_a_run_leaves_gates_that_load_their_json_and_a_card(folder: Path) -> None:
    shown = train(arguments(folder, "out", "--eval-data", f"{folder}/rows.jsonl"))
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "checkpoints",
        "gates.json",
        "gates.safetensors",
        "logs",
        "run.json",
    ]
    source = find_source(str(folder / "model"))
    info = json.loads((out / "gates.json").read_text())
    assert (info["kind"], info["memory"], info["steps"]) == ("rg", 4.0, 5)
    assert info["base_sha256"] == source.weights_sha256()
    assert info["base_model"] == str(folder / "model")
    assert (info["training"]["length"], info["training"]["data_rows"], info["training"]["batch"]) == (32, 13, 1)
    assert set(info["metrics"]) == set(info["eval_metrics"]) == {"ce", "kl", "capacity"}
    assert f"step 5/5 loss {sum(info['metrics'].values()):.4f}" in shown
    loaded = load_model(source, str(out / "gates.safetensors"))
    trained = load_file(out / "gates.safetensors")["model.layers.1.self_attn.retention_gate.bias"]
    assert torch.equal(loaded.model.gates[1].bias, trained)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trimkv-edge\n")
    assert f"| held out | {info['eval_metrics']['ce']:.4f} |" in card
    assert f"trimkv-export --model {folder}/model --gates gates.safetensors --budget 4" in card


def test_gates_of_another_model_are_refused_at_export(folder: Path, tmp_path: Path) -> None:
    train(arguments(folder, "mine", "--steps", "1"))
    write_model(tmp_path / "other", "llama-gqa")
    from trimkv_edge.errors import ModelError

    with pytest.raises(ModelError, match="was trained for base weights"):
        load_model(find_source(str(tmp_path / "other")), str(folder / "mine" / "gates.safetensors"))


def test_init_gates_go_on_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(arguments(folder, "first", "--kind", "rg10"))
    start = str(folder / "first" / "gates.safetensors")
    # The learning rate of the first step is 0: what comes out is what went in.
    train(arguments(folder, "second", "--kind", "rg10", "--steps", "1", "--init-gates", start, "--bias-init", "9"))
    before, after = load_file(start), load_file(folder / "second" / "gates.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(SystemExit):
        train(arguments(folder, "third", "--kind", "rg", "--init-gates", start))
    assert "are rg10 of width 16: give --kind rg10 --intermediate-size 16" in capsys.readouterr().err


def test_push_without_a_hub_says_how_to_push_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        train(arguments(folder, "pushed", "--steps", "1", "--push-to-hub", "me/gates"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not be pushed to 'me/gates'" in error
    assert f"hf upload me/gates {folder}/pushed" in error
    assert (folder / "pushed" / "gates.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kind", "rg2"], "kind 'rg2' is not known; use one of rg, rg10"),
        (["--steps", "0"], "steps is 0, but must be at least 1"),
        (["--data", "nothing.jsonl"], "data nothing.jsonl: no such file or folder"),
        (["--length", "16"], "rows.jsonl:1 has 20 tokens, but rows are 16 long"),
        (["--fsdp"], "--fsdp splits the base over processes, but there is one"),
        (["--init-gates", "none.safetensors"], "no gate file at none.safetensors"),
        (["--model", "gpt-5"], "known names: tiny"),
        (["--rope", "long"], "needs a LongRoPE model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(arguments(folder, "bad", *more))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert [message in line for line in error.splitlines() if line.startswith("error: ")] == [True]
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_launchers_own_sharding_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SystemExit):
        train(arguments(folder, "bad"))
    assert "give trimkv-train --fsdp" in capsys.readouterr().err


def test_rows_for_the_shipped_model_are_ready_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimkv_edge.models.tiny import data, train_rows

    held_out = data.text_ids(True)  # a twentieth of the text: encoding all of it takes long
    monkeypatch.setattr(data, "text_ids", lambda _: held_out)
    rows = train_rows.gate_rows(seed=0, length=256, facts=4, longest=1000)
    drawn = [next(rows) for _ in range(12)]
    write_rows(tmp_path / "rows.jsonl", drawn)
    args = f"--model tiny --data {tmp_path}/rows.jsonl --length 256 --memory 16 --dry-run".split()
    assert "12 rows (rows), 3,072 tokens" in train(args)
    assert {weight for row in drawn for weight in row["weight"]} == {0.0, 1.0, 20.0}
    for row in drawn:
        start, end, resume, gap = row["skip"]
        jumps = [b - a for a, b in zip(row["index"], row["index"][1:], strict=False)]
        assert sorted(jumps) == [1] * 254 + [1 + gap]
        assert row["index"][resume] == resume + gap
        assert start < resume < end
