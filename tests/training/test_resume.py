"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import arguments, history, train, train_loudly, write_model, write_rows

from trimkv_edge.training import checkpoint

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    write_model(made / "model")
    write_rows(made / "rows.jsonl")
    train(options(made, "whole"))
    return made


def options(folder: Path, output: str, *more: str) -> list[str]:
    return arguments(folder, output, "--steps", str(STEPS), "--save-every", "1", "--rows", "2", *more)


def run_until_killed(folder: Path, output: str, lines: int, extra: float) -> int:
    """Starts or resumes, waits for `lines` more steps on its output and `extra` seconds, kills -9; the steps shown."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trimkv_edge.cli.training"])
    printed = folder / f"{output}.txt"
    before = steps_shown(printed)
    worker = context.Process(target=train_loudly, args=(options(folder, output, "--resume"), str(printed)))
    worker.start()
    deadline = time.monotonic() + 120
    while steps_shown(printed) < before + lines:
        assert worker.is_alive(), printed.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(extra)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    return steps_shown(printed)


def steps_shown(printed: Path) -> int:
    return printed.read_text().count("step ") if printed.exists() else 0


def test_killed_at_random_moments_a_run_ends_bit_equal(folder: Path) -> None:
    # A save takes longer than a step here, so most of these moments lie inside one.
    rng = random.Random(0)
    for _ in range(4):
        run_until_killed(folder, "killed", rng.randint(2, 5), rng.random() * 0.05)
        for found in checkpoint.complete(folder / "killed"):
            names = {path.name for path in found.iterdir()}
            assert names == {"gates.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    assert "resume" in train(options(folder, "killed", "--resume"))
    whole, killed = history(folder / "whole"), history(folder / "killed")
    assert [entry["step"] for entry in killed] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in killed] == [entry["loss"] for entry in whole]
    expected = load_file(folder / "whole" / "gates.safetensors")
    found = load_file(folder / "killed" / "gates.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    states = [
        torch.load(folder / name / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt")
        for name in ("whole", "killed")
    ]
    for key, tensors in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in tensors.items())


def test_a_checkpoint_holds_the_gates_and_not_the_base(folder: Path) -> None:
    newest = checkpoint.complete(folder / "whole")[-1]
    assert len(load_file(newest / "gates.safetensors")) == 2 * 4  # two layers of linear1 (2), linear2, bias
    assert sum(path.stat().st_size for path in newest.iterdir()) < 120_000
    assert len(checkpoint.complete(folder / "whole")) == 2


def test_what_a_killed_save_left_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.clear_staging(tmp_path)
    half = checkpoint.staging(tmp_path) / "checkpoint-7"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    assert checkpoint.complete(tmp_path) == []
    (tmp_path / "run.json").write_text('{"seed": 0}')
    assert checkpoint.check_output(tmp_path, resume=True, force=False, settings={"seed": 0}) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--seed", "1"], "seed was 0 and is now 1"),
        (["--resume", "--lr", "0.5"], "lr was 0.01 and is now 0.5"),
        (["--resume", "--rows", "1"], "batch was 2 and is now 1"),
        (["--resume", "--force"], "give one of them"),
        ([], "--resume goes on with it, --force starts over"),
    ],
)
def test_a_run_is_not_mixed_with_another(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(options(folder, "whole", *more))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_other_data_or_another_base_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    write_rows(folder / "others.jsonl", rows[1:])
    write_model(folder / "other", "llama-gqa")
    for more, message in (
        (["--data", f"{folder}/others.jsonl"], "data sha256"),
        (["--model", f"{folder}/other"], "base"),
    ):
        with pytest.raises(SystemExit):
            train(options(folder, "whole", "--resume", *more))
        assert f"{message}" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    for more in ([], ["--force"], ["--resume"]):
        with pytest.raises(SystemExit):
            train(options(folder, "mine", *more))
        assert "holds thesis.txt but no training" in capsys.readouterr().err
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.txt"]


def test_force_starts_over(folder: Path) -> None:
    train(arguments(folder, "forced", "--steps", "3"))
    train(arguments(folder, "forced", "--steps", "2", "--force", "--seed", "5"))
    assert [entry["step"] for entry in history(folder / "forced")] == [1, 2]
