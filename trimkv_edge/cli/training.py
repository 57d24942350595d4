"""The work of ``trimkv-train``: brings models and training together, which do not know each other."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoTokenizer, set_seed

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.models.gate_source import find_gates
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, load_gates, save_gates
from trimkv_edge.models.loading import load_base
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.models.source import ModelSource, find_source
from trimkv_edge.retention import build_gates
from trimkv_edge.training.checkpoint import check_output, prepare_output
from trimkv_edge.training.config import TrainConfig
from trimkv_edge.training.data import DataConfig, read_rows
from trimkv_edge.training.finish import gate_info, push_to_hub, write_gates
from trimkv_edge.training.module import GateModule
from trimkv_edge.training.rows import Rows
from trimkv_edge.training.trainer import GateTrainer, on_cpu

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """A checked training; nothing is written or loaded yet but data and gates.

    Attributes:
        record: what a resumed run must share.
        checkpoint: where to go on from; None is a new run.
        memory: estimate in bytes by name, for each process.
        first: this is the process that prints and writes.
    """

    args: argparse.Namespace
    config: TrainConfig
    source: ModelSource
    gates: nn.ModuleList
    rows: Rows
    held_out: Rows | None
    output: Path
    record: dict[str, Any]
    checkpoint: Path | None
    processes: int
    base_parameters: int
    gate_parameters: int
    memory: dict[str, int]
    first: bool


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that a launcher started, and leaves them at the end."""
    PartialState(cpu=on_cpu())
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def plan(args: argparse.Namespace, settings: dict[str, Any]) -> Job:
    """Checks everything that can be checked before the base is loaded.

    Raises:
        TrimKVError: a setting, the data, the model's files or the output folder cannot be used.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ConfigError(
            "accelerate's --use_fsdp would shard the gates with the base: leave it out, and give trimkv-train --fsdp"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        raise ConfigError("DeepSpeed is not supported: leave --use_deepspeed out, and give trimkv-train --fsdp")
    source = find_source(args.model, args.weights, args.random_weights)
    shape, digest = GateShape.of(source.config), source.weights_sha256(args.seed)
    width = settings.pop("intermediate_size") or min(source.family.gate_intermediate_size, source.config.hidden_size)
    initial = None
    if args.init_gates:
        initial, info = load_gates(find_gates(args.init_gates), shape, None if source.random_weights else digest)
        if (
            info.kind != settings["kind"]
            or (args.intermediate_size or info.intermediate_size) != info.intermediate_size
        ):
            raise ConfigError(
                f"--init-gates {args.init_gates} are {info.kind} of width {info.intermediate_size}: "
                f"give --kind {info.kind} --intermediate-size {info.intermediate_size}, or other gates"
            )
        width = info.intermediate_size
    config = TrainConfig(**settings, intermediate_size=width)
    gates = initial or _new_gates(config, shape)
    state = PartialState()
    if config.shard and state.num_processes < 2:
        raise ConfigError("--fsdp splits the base over processes, but there is one: start with accelerate launch")
    parameters = source.shape().parameters
    rows = _rows(args, config, source, args.data, state.is_main_process)
    held_out = _rows(args, config, source, args.eval_data, state.is_main_process) if args.eval_data else None
    record = {
        **config.fixed(state.num_processes),
        "base_sha256": digest,
        "data_sha256": rows.sha256(),
        "rope": args.rope,
        "init_gates": info.sha256 if initial is not None else None,
    }
    output = args.output or Path("gates") / f"{Path(args.model).name or 'model'}-{config.kind}"
    gate_parameters = sum(parameter.numel() for parameter in gates.parameters())
    return Job(
        args=args,
        config=config,
        source=source,
        gates=gates,
        rows=rows,
        held_out=held_out,
        output=output,
        record=record,
        checkpoint=check_output(output, args.resume, args.force, record),
        processes=state.num_processes,
        base_parameters=parameters,
        gate_parameters=gate_parameters,
        memory=_memory(config, source.config, parameters, gate_parameters, state.num_processes),
        first=state.is_main_process,
    )


def run(job: Job) -> Any:
    """Trains, measures, writes the gates and, if asked, pushes them; returns the frozen base."""
    started = time.perf_counter()
    config, state = job.config, PartialState()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    base = load_base(job.source, config.seed)
    fix_rope(base, job.args.rope)
    module = GateModule(GatedModel(base, job.gates).base, job.gates, config)
    if job.first:
        prepare_output(job.output, job.checkpoint, job.record)
    state.wait_for_everyone()
    set_seed(config.seed)
    trainer = GateTrainer(module, job.rows, config, job.output)
    trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    logged = [entry for entry in trainer.state.log_history if "ce" in entry]
    metrics = {name: logged[-1][name] for name in ("ce", "kl", "capacity")}
    eval_metrics = trainer.measure(job.held_out) if job.held_out is not None else None
    if job.first:
        name = job.source.origin if job.source.origin != "shipped" else job.source.name
        info = gate_info(
            config,
            job.source.config,
            name,
            job.record["base_sha256"],
            job.rows,
            tuple(job.args.data),
            job.processes,
            metrics,
            eval_metrics,
        )
        write_gates(job.output, module.gates, info, save_gates)
        print(f"made      {job.output / 'gates.safetensors'} in {time.perf_counter() - started:.0f} s")
        for where, values in (("training", metrics), ("held out", eval_metrics)):
            if values:
                print(f"  {where:<9} " + " ".join(f"{part} {value:.4f}" for part, value in values.items()))
        print(f"use it    trimkv-export --model {job.args.model} --gates {job.output / 'gates.safetensors'}")
        if job.args.push_to_hub:
            print(f"pushed    {push_to_hub(job.output, job.args.push_to_hub)}")
    state.wait_for_everyone()
    return module.base


def _new_gates(config: TrainConfig, shape: GateShape) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build_gates(
            config.kind,
            shape.num_layers,
            shape.hidden_size,
            shape.num_kv_heads,
            config.intermediate_size,
            shape.act,
            config.bias_init,
        )


def _rows(args: argparse.Namespace, config: TrainConfig, source: ModelSource, data: list[str], show: bool) -> Rows:
    def tokenizer() -> Any:
        if source.folder is None:
            raise ModelError(f"{source.name} has no tokenizer here: give --weights DIR, or ready rows of input_ids")
        try:
            return AutoTokenizer.from_pretrained(source.folder)
        except (OSError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())[:200]
            raise ModelError(f"no usable tokenizer in {source.folder} ({detail})") from error

    wanted = DataConfig(
        sources=tuple(data),
        length=config.length,
        vocab_size=source.config.vocab_size,
        split=args.split,
        text_column=args.text_column,
        answers_only=args.answers_only,
    )
    return read_rows(wanted, tokenizer, progress=show and os.isatty(2))


def _memory(config: TrainConfig, base: Any, parameters: int, gate_parameters: int, processes: int) -> dict[str, int]:
    """Rough peak in bytes: weights, gates with optimiser, what the backward pass keeps, one block of logits."""
    size = _BYTES[config.dtype]
    tokens = config.rows * config.length
    # A layer keeps about ten hidden states and three MLP states; with recomputing only its input.
    layer = 10 * base.hidden_size + 3 * base.intermediate_size
    layers = base.num_hidden_layers
    kept = tokens * size * (layers * base.hidden_size + layer if config.gradient_checkpointing else layers * layer)
    return {
        "weights": parameters * size // (processes if config.shard else 1),
        "gates": 16 * gate_parameters,
        "activations": kept,
        "logits": 4 * 4 * min(config.block, tokens) * base.vocab_size,
    }
