"""Export targets: one line each. ``ops`` is the operator set of a target; the first is the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.manifest import Target, TokenizerInfo
from trimkv_edge.models.gated import GatedModel

ExportFn = Callable[[GatedModel, CacheConfig, Path, str, TokenizerInfo | None], Target]


@dataclass(frozen=True)
class TargetSpec:
    """How to export a target; the engine of the same name runs it. Libraries are imported when they are needed."""

    ops: tuple[str, ...]
    export: ExportFn


def _executorch(
    model: GatedModel, config: CacheConfig, folder: Path, ops: str, tokenizer: TokenizerInfo | None
) -> Target:
    from trimkv_edge.export.executorch import export_executorch

    metadata: dict[str, int | list[int]] = {}
    if tokenizer is not None:
        metadata["get_eos_ids"] = tokenizer.eos_token_ids
        if tokenizer.bos_token_id is not None:
            metadata["get_bos_id"] = tokenizer.bos_token_id
    return export_executorch(model, config, folder, ops=ops, metadata=metadata)


def _onnx(model: GatedModel, config: CacheConfig, folder: Path, ops: str, tokenizer: TokenizerInfo | None) -> Target:
    from trimkv_edge.export.onnx import export_onnx

    return export_onnx(model, config, folder, ops=ops)


TARGETS: dict[str, TargetSpec] = {
    "executorch": TargetSpec(("xnnpack", "portable"), _executorch),
    "onnx": TargetSpec(("gqa", "standard"), _onnx),
}


def check_ops(targets: Sequence[str], ops: Sequence[str]) -> dict[str, str]:
    """Operator set of each target: those of ``ops`` that belong to it, else its default.

    Raises:
        ConfigError: unknown target, an operator set no chosen target has, or two for one target.
    """
    chosen: dict[str, str] = {}
    for name in targets:
        if name not in TARGETS:
            raise ConfigError(f"target {name!r} is not known; use {', '.join(TARGETS)}")
        wanted = [op for op in ops if op in TARGETS[name].ops]
        if len(wanted) > 1:
            raise ConfigError(f"target {name} takes one operator set, but {', '.join(wanted)} were given")
        chosen[name] = wanted[0] if wanted else TARGETS[name].ops[0]
    unused = [op for op in ops if op not in chosen.values()]
    if unused or not chosen:
        allowed = "; ".join(f"{name}: {', '.join(spec.ops)}" for name, spec in TARGETS.items())
        raise ConfigError(
            f"operator set {', '.join(unused) or '(no target)'} fits no chosen target; they are {allowed}"
        )
    return chosen
