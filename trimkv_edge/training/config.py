"""Settings of a gate training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.retention import GATE_KINDS
from trimkv_edge.training.losses import FORMS, SCOPES

DTYPES = ("float32", "bfloat16")
DEFAULT_SCOPE = {"rg": "head", "rg10": "global"}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how; every field is checked at construction.

    Defaults are those of TRIM-KV (arXiv 2512.03324) where it gives them.

    Attributes:
        kind: gate kind, ``rg`` or ``rg10``.
        memory: budget M per KV head that the capacity loss asks for (``global``: on average).
        scope: ``head`` (one budget for each head) or ``global`` (one pool over all layers and heads); empty means
            ``head`` for ``rg`` and ``global`` for ``rg10``, as published.
        capacity_form: ``paper`` or ``code``, see :func:`trimkv_edge.training.losses.capacity`.
        capacity_weight, kl_weight, ce_weight: factors of the three losses.
        length: tokens per row.
        rows: rows per device and forward pass.
        accumulation: forward passes per optimiser step.
        steps: optimiser steps.
        lr, min_lr: highest learning rate, and the one that the cosine ends at.
        warmup: share of the steps over which the learning rate rises to ``lr``.
        weight_decay, grad_clip: of AdamW; biases are not decayed.
        bias_init: initial gate bias b (beta starts at sigmoid(b)).
        intermediate_size: width of the gates.
        seed: of initial gates and data order.
        save_every, keep, log_every: steps between checkpoints, checkpoints kept, steps between log lines.
        dtype: of the frozen base; gates and losses are always float32.
        gradient_checkpointing: recompute each layer in the backward pass.
        shard: split the frozen base over the processes (FSDP).
        block: tokens whose logits exist at once.

    Raises:
        ConfigError: a value that is out of range.
    """

    kind: str
    memory: float
    length: int
    steps: int
    intermediate_size: int
    scope: str = ""
    capacity_form: str = "paper"
    capacity_weight: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    rows: int = 1
    accumulation: int = 1
    lr: float = 2e-4
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    bias_init: float = 8.0
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    shard: bool = False
    block: int = 1024

    def __post_init__(self) -> None:
        if not self.scope:
            object.__setattr__(self, "scope", DEFAULT_SCOPE.get(self.kind, "head"))
        _one_of("kind", self.kind, GATE_KINDS)
        _one_of("scope", self.scope, SCOPES)
        _one_of("capacity form", self.capacity_form, FORMS)
        _one_of("dtype", self.dtype, DTYPES)
        for name in (
            "rows",
            "accumulation",
            "steps",
            "intermediate_size",
            "save_every",
            "keep",
            "log_every",
            "block",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("length", self.length, 2)
        for name in ("memory", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name.replace('_', ' ')} is {getattr(self, name)}, but must be above 0")
        for name in ("capacity_weight", "kl_weight", "ce_weight", "min_lr", "weight_decay", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name.replace('_', ' ')} is {getattr(self, name)}, but must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warm-up is {self.warmup}, but is a share of the steps: 0 or more, below 1")
        if self.min_lr > self.lr:
            raise ConfigError(f"min lr {self.min_lr} is above lr {self.lr}")
        if not math.isfinite(self.bias_init):
            raise ConfigError(f"bias init is {self.bias_init}, but must be a number")
        if self.kl_weight + self.ce_weight == 0:
            raise ConfigError("kl weight and ce weight are both 0: gates need one of them, or they forget everything")

    def fixed(self, processes: int) -> dict[str, Any]:
        """The settings that a resumed run must share: all but how the work is divided, saved and shown."""
        settings = asdict(self)
        for name in (
            "rows",
            "accumulation",
            "save_every",
            "keep",
            "log_every",
            "gradient_checkpointing",
            "shard",
            "block",
        ):
            del settings[name]
        return {**settings, "batch": self.rows * self.accumulation * processes}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is not known; use one of {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name.replace('_', ' ')} is {value}, but must be at least {least}")
