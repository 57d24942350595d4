"""``trimkv-train``: a frozen model and data in, retention gates out."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_edge.cli.common import quiet_libraries, run_cli

if TYPE_CHECKING:
    from trimkv_edge.cli.training import Job

_EPILOG = """\
examples:
  trimkv-train --model qwen3-0.6b --kind rg --data chats.jsonl --memory 256 --length 4096 --steps 2000 -o gates/q06
  trimkv-train ... --dry-run                          what will be trained, how much memory will it take?
  trimkv-train ... -o gates/q06 --resume              go on after a kill: same data order, same optimiser state

several GPUs, and several nodes (run it on each node, with the output on a shared disk):
  accelerate launch --num_processes 4 -m trimkv_edge.cli.train --model qwen3-4b ... --dtype bfloat16
  accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1 \\
      --main_process_port 29500 -m trimkv_edge.cli.train ...
  accelerate launch --num_processes 4 -m trimkv_edge.cli.train ... --fsdp     the base does not fit one GPU

data (--data, one or more, all of one kind):
  .txt files                      texts, joined and cut into rows of --length
  .jsonl {"text": ...}            the same
  .jsonl {"messages": [...]}      chats through the model's template, one per row; --answers-only weighs the answers
  .jsonl {"input_ids": [...]}     ready rows; optional "index", "weight", "skip" (docs/training.md)
  a folder of these, a data set saved to disk, or a hub id (--split, --text-column)

The loss is cross-entropy + KL to the model's own vanilla pass + what is held above --memory entries per head.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-train",
        description="Train retention gates for a frozen model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what").add_argument
    add(
        "--model", required=True, metavar="NAME|ID|DIR", help="a known name (tiny, qwen3-4b, ...), a hub id or a folder"
    )
    add("--weights", type=Path, metavar="DIR", help="folder with the weights of --model")
    add("--random-weights", action="store_true", help="seeded random weights, for shape work")
    add("--rope", default="auto", help="LongRoPE models: short, long or auto (= long)")
    add("--kind", default="rg", help="gate kind: rg (default, one per layer) or rg10 (shared final projection)")
    add("--data", nargs="+", required=True, metavar="PATH|ID", help="files, folders or hub data sets, see below")
    add("--eval-data", nargs="+", metavar="PATH|ID", help="held-out rows of the same forms, measured at the end")
    add("-o", "--output", type=Path, metavar="DIR", help="folder to make (default: gates/NAME-KIND)")
    add("--split", default="train", help="split of data sets (default train)")
    add("--text-column", default="text", metavar="NAME", help="column of data sets of text (default text)")
    add("--answers-only", action="store_true", help="chats: only the assistant's tokens weigh")
    add("--init-gates", metavar="ID|DIR|FILE", help="start from these gates (of --kind), not from new ones")

    add = parser.add_argument_group("training").add_argument
    add("--memory", type=float, default=256.0, metavar="M", help="budget per KV head to train for (default 256)")
    add("--length", type=int, default=2048, help="tokens per row (default 2048)")
    add("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
    add("--rows", type=int, default=1, help="rows per device and pass (default 1)")
    add("--accumulation", type=int, default=1, help="passes per step (default 1)")
    add("--lr", type=float, default=2e-4, help="highest learning rate (default 2e-4)")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end (default 1e-6)")
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="share of the steps to warm up (default 0.1)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (default 0.01)")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm; 0 is no limit (default 1)")
    add("--ce-weight", type=float, default=1.0, help="weight of cross-entropy (default 1)")
    add("--kl-weight", type=float, default=1.0, help="weight of the KL loss (default 1)")
    add("--capacity-weight", type=float, default=1.0, help="weight of the capacity loss (default 1)")
    add("--scope", default="", help="head (default for rg) or global (default for rg10): whose budget it is")
    add("--capacity-form", default="paper", help="paper (default) or code: normalisation of the capacity loss")
    add("--bias-init", type=float, default=8.0, help="initial gate bias (default 8: beta starts near 1)")
    add("--intermediate-size", type=int, metavar="I", help="gate width (default: the family's, at most the model's)")
    add("--seed", type=int, default=0, help="of initial gates and data order (default 0)")

    add = parser.add_argument_group("machine").add_argument
    add("--dtype", default="float32", help="of the base: float32 (default) or bfloat16; gates are float32")
    add("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass: less memory")
    add("--block", type=int, default=1024, help="tokens whose logits exist at once (default 1024)")
    add("--fsdp", dest="shard", action="store_true", help="split the base over the processes of accelerate launch")

    add = parser.add_argument_group("run").add_argument
    add("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    add("--keep", type=int, default=2, help="checkpoints kept (default 2)")
    add("--log-every", type=int, default=10, help="steps between log lines (default 10)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in the output folder, if there is one")
    add("--force", action="store_true", help="start over in an output folder that holds a training")
    add("--push-to-hub", metavar="REPO", help="upload gates and model card to this hub repository at the end")
    add("--dry-run", action="store_true", help="print what will be trained and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _train(args))


def _train(args: argparse.Namespace) -> None:
    quiet_libraries()
    # torch and transformers take seconds to import: --help and option errors do not wait for them.
    from trimkv_edge.cli.training import plan, processes, run

    with processes():
        job = plan(args, _settings(args))
        if job.first:
            for line in describe(job):
                print(line, flush=True)
        if not args.dry_run:
            run(job)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    from trimkv_edge.training.config import TrainConfig

    names = {field.name for field in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def describe(job: Job) -> list[str]:
    """What will be trained."""
    import torch

    from trimkv_edge.budget import format_bytes

    config, rows = job.config, job.rows
    batch = config.rows * config.accumulation * job.processes
    memory = job.memory
    lines = [
        f"model     {job.source.name} ({job.source.origin}): {job.base_parameters / 1e6:.1f} M frozen parameters "
        f"in {config.dtype}",
        f"gates     {config.kind}, width {config.intermediate_size}: {job.gate_parameters:,} trained parameters; "
        f"budget {config.memory:g} per head, capacity {config.scope} ({config.capacity_form})",
        f"data      {len(rows):,} rows ({rows.kind}), {rows.tokens:,} tokens; {config.length} tokens per row",
        f"steps     {config.steps} of {batch} rows = {batch * config.length:,} tokens "
        f"({config.rows} per pass x {config.accumulation} passes x {job.processes} processes): "
        f"{config.steps * batch / len(rows):.1f} times through the data",
        f"memory    about {format_bytes(sum(memory.values()))} per process: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items()),
    ]
    if job.rows.kind != "rows" and config.memory >= config.length:
        lines.append(
            f"warning   rows of {config.length} tokens never fill a budget of {config.memory:g}: the capacity loss is 0"
        )
    gpus = torch.cuda.device_count()
    if job.processes == 1 and gpus > 1:
        lines.append(f"note      1 of {gpus} GPUs is used: accelerate launch --num_processes {gpus} uses all")
    if job.checkpoint is not None:
        lines.append(f"resume    {job.checkpoint}")
    return lines


if __name__ == "__main__":
    main()
