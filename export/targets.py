"""Export targets: one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import find_policy
from trimkv_edge.export.backends import BACKENDS, NOT_TOLD, UNSUPPORTED, X86, Backend, Ran
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.reference import Rounding, exact
from trimkv_edge.export.resume import Numbers
from trimkv_edge.host_eviction import require_host
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.manifest import Target, TokenizerInfo
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights


@dataclass(frozen=True)
class Job:
    """What a target is made from.

    Attributes:
        model: hollow or not; weights: its values by parameter name.
        folder: of the artefact.
        ops: operator set.
        scales: of int8 keys and values.
        key: of the numbers: source, gates and scheme.
        restart: do not go on with what an interrupted export left.
        soc: chip that is compiled for, where a target has a choice; None: its default.
        shards: parts that a graph is cut into, where a target can; None: as many as it needs.
        sizes: of pictures, (patches down, patches across), of a model that reads them.
        say: called with one line per stage.
        progress: called with (done, in all) in long stages.
    """

    model: GatedModel
    weights: Weights
    config: CacheConfig
    folder: Path
    ops: str
    scheme: Scheme
    tokenizer: TokenizerInfo | None
    scales: KVScales | None
    key: str
    restart: bool
    say: Callable[[str], None]
    progress: Callable[[int, int], None] | None
    soc: str | None = None
    shards: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    def numbers(self) -> Numbers:
        """How packing the weights is reported and gone on with."""
        return Numbers(self.key, self.restart, self.say, self.progress)


@dataclass(frozen=True)
class TargetSpec:
    """How to export a target; the engine of the same name runs it. Libraries are imported when they are needed.

    Attributes:
        ops: operator sets; the first is the default.
        kv_dtypes: how it can store keys and values.
        rounding: what quantised weights of this target are in float32.
        with_float_activations: ``(folder, target, scratch)`` -> the same target without activations rounded to int8,
            for verification; its files may lie in ``scratch``, inside the folder. None: it cannot be had.
        emulated: the same for a target in bfloat16, where no engine here computes in it.
        with_rounded_activations: the eager model that rounds activations as the target does. None: it cannot be had.
        check: raises :class:`TrimKVError` for cache settings that the target cannot have, or a package it lacks.
        runs: an engine here runs it, so that it can be verified.
        rounds: operator sets whose activations have few bits: agreement is measured and told, but not required.
        ran: what its files are for and where they were executed.
        vision: models that read pictures can be exported.
    """

    ops: tuple[str, ...]
    export: Callable[[Job], Target]
    rounding: Rounding = exact
    kv_dtypes: tuple[str, ...] = ("float32",)
    with_float_activations: Callable[[Path, Target, Path], Target] | None = None
    emulated: Callable[[Path, Target, Path], Target] | None = None
    with_rounded_activations: Callable[[GatedModel, Weights, Scheme], GatedModel] | None = None
    check: Callable[[CacheConfig], None] = lambda config: None
    runs: bool = True
    rounds: tuple[str, ...] = ()
    ran: Ran = NOT_TOLD
    vision: bool = False


def _executorch(job: Job) -> Target:
    from trimkv_edge.export.executorch import export_executorch

    metadata: dict[str, int | list[int]] = {}
    if job.tokenizer is not None:
        metadata["get_eos_ids"] = job.tokenizer.eos_token_ids
        if job.tokenizer.bos_token_id is not None:
            metadata["get_bos_id"] = job.tokenizer.bos_token_id
    return export_executorch(
        job.model,
        job.config,
        job.folder,
        ops=job.ops,
        scheme=job.scheme,
        weights=job.weights,
        metadata=metadata,
        sizes=job.sizes,
        numbers=job.numbers(),
        progress=job.say,
    )


def _executorch_rounding(weight: Tensor, bits: int, dtype: str) -> Tensor:
    from trimkv_edge.export.executorch_quantize import round_trip

    return round_trip(weight, bits)


def _executorch_reference(model: GatedModel, weights: Weights, scheme: Scheme) -> GatedModel:
    from trimkv_edge.export.executorch_quantize import reference_model

    return reference_model(model, weights, scheme)


def _onnx(job: Job) -> Target:
    from trimkv_edge.export.onnx import export_onnx

    return export_onnx(
        job.model,
        job.config,
        job.folder,
        ops=job.ops,
        scheme=job.scheme,
        weights=job.weights,
        scales=job.scales,
        sizes=job.sizes,
        numbers=job.numbers(),
        progress=job.say,
    )


def _onnx_rounding(weight: Tensor, bits: int, dtype: str) -> Tensor:
    from trimkv_edge.export.onnx_weights import round_trip

    return round_trip(weight, bits, dtype)


def _onnx_float(folder: Path, target: Target, scratch: Path) -> Target:
    from trimkv_edge.export.onnx import with_float_activations

    return with_float_activations(folder, target, scratch)


def _onnx_emulated(folder: Path, target: Target, scratch: Path) -> Target:
    from trimkv_edge.export.onnx_bf16 import emulate_bfloat16

    return emulate_bfloat16(folder, target, scratch)


def _host_evicted(job: Job) -> Target:
    from trimkv_edge.export.host_evicted import export_host_evicted

    return export_host_evicted(
        job.model,
        job.config,
        job.folder,
        scheme=job.scheme,
        weights=job.weights,
        numbers=job.numbers(),
        progress=job.say,
    )


def _torch(job: Job) -> Target:
    from trimkv_edge.export.torch_weights import export_torch

    return export_torch(job.model, job.folder, scheme=job.scheme, weights=job.weights, progress=job.progress)


def _torch_rounding(weight: Tensor, bits: int, dtype: str) -> Tensor:
    from trimkv_edge.export.torch_weights import round_trip

    return round_trip(weight, bits, dtype)


def _torch_check(config: CacheConfig) -> None:
    from trimkv_edge.gpu.cache import check_config

    if not find_policy(config.policy).pooled:
        check_config(config)


def _backend(name: str, backend: Backend) -> TargetSpec:
    def check(config: CacheConfig) -> None:
        require_host(config)
        backend.require(name)

    return TargetSpec(
        backend.precisions, backend.export, check=check, runs=backend.runs, rounds=backend.rounds, ran=backend.ran
    )


TARGETS: dict[str, TargetSpec] = {
    "executorch": TargetSpec(
        ("xnnpack", "portable"),
        _executorch,
        _executorch_rounding,
        with_rounded_activations=_executorch_reference,
        ran=Ran("CPUs", "ExecuTorch's runtime", device=X86),
        vision=True,
    ),
    "onnx": TargetSpec(
        ("gqa", "standard"),
        _onnx,
        _onnx_rounding,
        ("float32", "float16", "bfloat16", "int8"),
        _onnx_float,
        _onnx_emulated,
        ran=Ran("CPUs", "ONNX Runtime", device=X86),
        vision=True,
    ),
    "torch": TargetSpec(
        ("compiled",),
        _torch,
        _torch_rounding,
        ("float32", "float16", "bfloat16"),
        check=_torch_check,
        ran=Ran("GPUs and CPUs, through torch.compile", "torch", device=X86),
    ),
    "host-evicted": TargetSpec(
        ("rows",),
        _host_evicted,
        check=require_host,
        ran=Ran("hosts in any language, NPU compilers", "ONNX Runtime", device=X86),
    ),
    **{name: _backend(name, backend) for name, backend in BACKENDS.items()},
}


def check_ops(targets: Sequence[str], ops: Sequence[str]) -> dict[str, str]:
    """Operator set of each target: those of ``ops`` that belong to it, else its default.

    Raises:
        ConfigError: unknown target, an operator set no chosen target has, or two for one target.
    """
    chosen: dict[str, str] = {}
    for name in targets:
        if name in UNSUPPORTED:
            raise ConfigError(f"target {name} is not supported: {UNSUPPORTED[name]}")
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
