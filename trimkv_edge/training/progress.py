"""What a training shows: a bar with the losses on a terminal, short lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Shown by the first process only; `tokens` are those of one optimiser step."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.bar: Any = None
        self.began = 0.0
        self.first = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock."""
        self.began, self.first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar; the last step is always logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the losses since the last log."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        parts = {name: f"{logs[name]:.4f}" for name in ("loss", "ce", "kl", "capacity")}
        if self.bar is not None:
            self.bar.set_postfix(parts)
            return
        seconds = time.perf_counter() - self.began
        rate = (state.global_step - self.first) / max(seconds, 1e-9)
        left = (state.max_steps - state.global_step) / max(rate, 1e-9)
        shown = " ".join(f"{name} {value}" for name, value in parts.items())
        print(
            f"step {state.global_step}/{state.max_steps} {shown} lr {logs['learning_rate']:.2e} "
            f"{rate * self.tokens:.0f} tok/s, {left:.0f} s left",
            flush=True,
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
