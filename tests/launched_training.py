"""What `test_accelerate` runs in each of two processes: `torchrun --nproc_per_node 2 launched_training.py FOLDER`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from training_runs import arguments

from trimkv_edge.cli import train as command
from trimkv_edge.cli import training


def main() -> None:
    """Some trainings; how much of each layer this process held goes to a file."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    variants: dict[str, list[str]] = {
        "ddp": ["--kind", "rg10"],
        "fsdp": ["--kind", "rg10", "--fsdp", "--eval-data", f"{folder}/rows.jsonl"],
        "fsdp-resumed": ["--kind", "rg10", "--fsdp", "--resume"],
        "fsdp-recompute": ["--kind", "rg", "--fsdp", "--gradient-checkpointing"],
    }
    held: dict[str, float] = {}
    with training.processes():
        for name, more in variants.items():
            args = command.build_parser().parse_args(arguments(folder, name, "--rows", "1", *more))
            if name == "fsdp-resumed":
                cut_off(folder / "fsdp", folder / name)
            job = training.plan(args, command._settings(args))
            held[name] = share(training.run(job))
            first = job.first
    if first:
        (folder / "held.json").write_text(json.dumps(held))


def cut_off(whole: Path, copy: Path) -> None:
    """A copy of a run as it was at step 4."""
    state = PartialState()
    if state.is_main_process:
        (copy / "checkpoints").mkdir(parents=True)
        shutil.copy(whole / "run.json", copy)
        shutil.copytree(whole / "checkpoints" / "checkpoint-4", copy / "checkpoints" / "checkpoint-4")
    state.wait_for_everyone()


def share(base: Any) -> float:
    """Share of the frozen layers' weights that lies in this process."""
    whole = here = 0
    for name, parameter in base.model.layers.named_parameters():
        if "retention_gate" not in name:
            whole += parameter.numel()
            here += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
    return here / whole


if __name__ == "__main__":
    main()
