"""Hugging Face's Trainer for gates: exact normalisation, checkpoints of the gates alone, complete or absent."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from trimkv_edge.errors import ConfigError
from trimkv_edge.training import checkpoint
from trimkv_edge.training.config import TrainConfig
from trimkv_edge.training.module import GateModule
from trimkv_edge.training.progress import Progress
from trimkv_edge.training.rows import Batch, Rows, Shuffled, collate
from trimkv_edge.training.shard import shard_base

PARTS = ("ce", "kl", "capacity")
_GATE_FILE = "gates.safetensors"


def on_cpu() -> bool:
    """Whether training runs on the CPU: there is no CUDA device, or ``accelerate launch --cpu`` says so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return asked or not torch.cuda.is_available()


def training_arguments(config: TrainConfig, output: Path) -> TrainingArguments:
    """Trainer's arguments for our settings. Batches are read in order: `Shuffled` holds the order."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / checkpoint.LOGS)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.rows,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.min_lr},
        warmup_steps=math.ceil(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        seed=config.seed,
        use_cpu=on_cpu(),
        save_strategy="steps",
        save_steps=config.save_every,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_drop_last=False,
        dataloader_pin_memory=not on_cpu(),
        ddp_find_unused_parameters=False,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # DataParallel copies modules and would lose the base: more GPUs need accelerate launch
    return args


class GateTrainer(Trainer):
    """Trains the gates of a :class:`GateModule`.

    Cross-entropy and KL are divided by the token weight of the whole optimiser step, the capacity loss by its rows:
    over all processes and accumulated batches. So the same global batch gives the same gradient however it is divided.

    Args:
        module: gates and frozen base.
        rows: training rows.
        config: settings.
        output: output folder; checkpoints go to its ``checkpoints``.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, module: GateModule, rows: Rows, config: TrainConfig, output: Path) -> None:
        args = training_arguments(config, output)
        batch = config.rows * config.accumulation * args.world_size
        if config.shard:
            shard_base(module.base, module.gates, args.device)
        else:
            module.base.to(args.device)
        self.settings = config
        self.output = output
        self._run_dir: Path | None = None
        self._sums = torch.zeros(len(PARTS), dtype=torch.float64)
        self._summed_to = 0
        super().__init__(
            model=module,
            args=args,
            data_collator=collate,
            train_dataset=Shuffled(rows, batch * config.steps, config.seed),
            callbacks=[Progress(batch * config.length)],
        )
        self.remove_callback(PrinterCallback)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:  # type: ignore[override]
        """Token weight and rows of the optimiser step, [2], over all processes."""
        weight = sum(batch["weight"].double().sum() for batch in batch_samples)
        rows = sum(len(batch["weight"]) for batch in batch_samples)
        total = torch.tensor([float(weight), float(rows)], dtype=torch.float64).to(device, torch.float32)
        return self.accelerator.reduce(total, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's share of the step's loss, times the processes, because DDP averages gradients over them."""
        sums = model(**inputs)
        weight, rows = num_items_in_batch.clamp(min=1e-6)  # type: ignore[union-attr]
        parts = torch.stack([sums["ce"] / weight, sums["kl"] / weight, sums["capacity"] / rows])
        self._sums += parts.detach().double().cpu()
        loss = (parts * self._factors(parts)).sum() * self.accelerator.num_processes
        return (loss, sums) if return_outputs else loss

    def _factors(self, like: Tensor) -> Tensor:
        config = self.settings
        return like.new_tensor([config.ce_weight, config.kl_weight, config.capacity_weight])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the three losses over all processes since the last log.

        Raises:
            ConfigError: the loss is not finite.
        """
        if "loss" in logs:
            steps = self.state.global_step - self._summed_to
            sums = self.accelerator.reduce(self._sums.float().to(self.args.device), "sum")
            logs = {"loss": logs["loss"], **dict(zip(PARTS, (sums / steps).tolist(), strict=True)), **logs}
            self._sums.zero_()
            self._summed_to = self.state.global_step
            if not math.isfinite(logs["loss"]):
                raise ConfigError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --lr; "
                    "--resume goes on from the last checkpoint"
                )
        logs.pop("total_flos", None)
        super().log(logs, start_time)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        started: tuple[int, int] = super()._init_training_state(*args)
        self._summed_to = self.state.global_step
        return started

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir or self.output)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Puts the checkpoint together in a staging folder; it gets its name when it is complete."""
        if self.args.should_save:
            checkpoint.clear_staging(self.output)
        self.accelerator.wait_for_everyone()
        self._run_dir = checkpoint.staging(self.output)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.publish(self.output, f"checkpoint-{self.state.global_step}", self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only the gates, each tied tensor once."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self._gates().named_parameters()}, folder / _GATE_FILE
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / _GATE_FILE)
        parameters = dict(self._gates().named_parameters())
        if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
            raise ConfigError(f"{resume_from_checkpoint} holds other gates: start over with --force")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _gates(self) -> nn.ModuleList:
        module = self.accelerator.unwrap_model(self.model)
        gates: nn.ModuleList = module.gates
        return gates

    @torch.no_grad()
    def measure(self, rows: Rows) -> dict[str, float]:
        """`ce`, `kl` (nats per weighted token) and `capacity` (per row) over `rows`, divided over the processes."""
        module = self.accelerator.unwrap_model(self.model)
        here, processes = self.args.process_index, self.args.world_size
        sums = torch.zeros(len(PARTS) + 1, device=self.args.device)
        for first in range(0, len(rows), processes):
            # A sharded base needs every process in every pass: the last round repeats a row that does not count.
            counts = first + here < len(rows)
            batch = {k: v.to(self.args.device) for k, v in collate([rows.item(first + here if counts else 0)]).items()}
            parts = module(**batch)
            if counts:
                sums += torch.stack([*(parts[name] for name in PARTS), batch["weight"].sum()])
        ce, kl, capacity, weight = self.accelerator.reduce(sums, "sum").tolist()
        return {"ce": ce / max(weight, 1e-6), "kl": kl / max(weight, 1e-6), "capacity": capacity / len(rows)}
