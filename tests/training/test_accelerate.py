"""Two processes (gloo, CPU): the same global batch gives the same curve and the same gates as one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import arguments, history, train, write_model, write_rows

pytestmark = pytest.mark.alone
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launched")
    write_model(made / "model")
    write_rows(made / "rows.jsonl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMKV_DEBUG": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(TESTS)
    command = [*launch, str(TESTS / "launched_training.py"), str(made)]
    done = subprocess.run(command, env=environment, cwd=made, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize(("name", "kind"), [("ddp", "rg10"), ("fsdp", "rg10"), ("fsdp-recompute", "rg")])
def test_two_processes_equal_one(folder: Path, name: str, kind: str) -> None:
    single = f"single-{name}"
    train(arguments(folder, single, "--kind", kind, "--rows", "2"))
    expected, found = history(folder / single), history(folder / name)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 5]
    for one, two in zip(expected, found, strict=True):
        for part in ("loss", "ce", "kl", "capacity"):
            assert two[part] == pytest.approx(one[part], rel=1e-5, abs=1e-6), (name, one["step"], part)
    gates = load_file(folder / single / "gates.safetensors")
    for key, tensor in load_file(folder / name / "gates.safetensors").items():
        torch.testing.assert_close(tensor, gates[key], rtol=1e-4, atol=1e-5)


def test_accelerate_launch_equals_one_process(folder: Path) -> None:
    """The command that users type. On CPUs accelerate starts more than one process only under its ``--multi_gpu``."""
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command = [*launch, "-m", "trimkv_edge.cli.train", *arguments(folder, "launched", "--kind", "rg10", "--rows", "1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMKV_DEBUG": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 passes x 2 processes" in done.stdout
    train(arguments(folder, "alone", "--kind", "rg10", "--rows", "2"))
    for one, two in zip(history(folder / "alone"), history(folder / "launched"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_resumed_sharded_run_ends_bit_equal(folder: Path) -> None:
    whole, resumed = (load_file(folder / name / "gates.safetensors") for name in ("fsdp", "fsdp-resumed"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def test_held_out_rows_are_measured_once_each(folder: Path) -> None:
    # 13 rows over two processes: the last round has one row for two.
    data = str(folder / "rows.jsonl")
    train(arguments(folder, "measured", "--kind", "rg10", "--rows", "2", "--eval-data", data))
    one, two = (json.loads((folder / n / "gates.json").read_text())["eval_metrics"] for n in ("measured", "fsdp"))
    assert two == pytest.approx(one, rel=1e-5)


def test_accumulation_equals_a_larger_batch(folder: Path) -> None:
    train(arguments(folder, "accumulated", "--kind", "rg10", "--rows", "1", "--accumulation", "2"))
    for one, two in zip(history(folder / "ddp"), history(folder / "accumulated"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_fsdp_holds_half_of_the_layers_in_each_process(folder: Path) -> None:
    held = json.loads((folder / "held.json").read_text())
    assert held["ddp"] == 1.0
    assert held["fsdp"] == pytest.approx(0.5, abs=0.01)
    assert held["fsdp-recompute"] == pytest.approx(0.5, abs=0.01)
