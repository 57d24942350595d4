"""From a request to a finished artefact folder: plan, load, export each target, verify, write the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimkv_edge.budget import (
    MemoryEstimate,
    ModelShape,
    check_budget,
    check_fits,
    estimate_memory,
    parse_budget,
    parse_size,
)
from trimkv_edge.calibration.request import check_request
from trimkv_edge.caps import CAPS_FILE, Calibration, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import find_policy, pooled_policies, require_exportable
from trimkv_edge.export.caps import AUTO, calibrate_within, caps_from_file, check_gates
from trimkv_edge.export.targets import TARGETS, check_ops
from trimkv_edge.export.tokenizer import copy_tokenizer, sample_tokens
from trimkv_edge.export.verify import check, compare, load_tolerance, stream_plan
from trimkv_edge.files import new_folder
from trimkv_edge.manifest import SCHEMA_VERSION, ByteInfo, Manifest, Target, describe_files
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.loading import LoadedModel, choose_gates, gates_for, load_model
from trimkv_edge.models.source import ModelSource, find_source
from trimkv_edge.runtime.engines import engine_class

_TOOLS = ("trimkv-edge", "torch", "transformers", "executorch", "onnx", "onnxscript", "onnxruntime", "tokenizers")


@dataclass(frozen=True)
class ExportRequest:
    """What ``trimkv-export`` was asked for; see its ``--help`` for each field."""

    model: str
    output: Path
    budget: str = "512"
    buffer: int = 128
    prefill_chunk: int = 128
    policy: str = "trimkv"
    sinks: int = 0
    recent: int = 0
    min_per_head: int = 0
    threshold: float = 0.0
    caps: str | None = None
    caps_target: float | None = None
    targets: tuple[str, ...] = ("executorch", "onnx")
    ops: tuple[str, ...] = ()
    gates: str | None = None
    dtype: str = "float32"
    rope: str = "auto"
    weights: Path | None = None
    random_weights: bool = False
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class ExportPlan:
    """A request whose settings were checked, and what it will cost.

    Attributes:
        config: without caps where heads share a budget and they are calibrated by the export itself.
        gates: kind and file.
        calibration: what a caps file says.
    """

    request: ExportRequest
    source: ModelSource
    shape: ModelShape
    config: CacheConfig
    memory: MemoryEstimate
    ops: dict[str, str]
    gates: tuple[str, Path | None]
    calibration: Calibration | None = None

    @property
    def export_peak(self) -> int:
        """Estimated peak bytes of the export itself: weights, their copy in the graph, and the libraries."""
        return 2 * self.memory.weights + 2 * self.memory.cache + 2**30

    def check_fits(self) -> None:
        """Raises :class:`~trimkv_edge.errors.BudgetError` if the export needs more memory than is available."""
        check_fits(self.export_peak, f"exporting {self.request.model} with a budget of {self.config.budget}")


Report = Callable[[str], None]


def plan_export(request: ExportRequest) -> ExportPlan:
    """Checks everything that can be checked before loading weights.

    Raises:
        TrimKVError: a setting is wrong, the model is not found, or the budget cannot be honoured.
    """
    if request.dtype != "float32":
        raise ConfigError(f"dtype {request.dtype!r} cannot be exported yet: use --dtype float32")
    policy = find_policy(request.policy)
    ops = check_ops(request.targets, request.ops)
    source = find_source(request.model, request.weights, request.random_weights)
    request = replace(request, gates=gates_for(policy, source, request.gates))
    kind, gate_path = choose_gates(source, request.gates)
    config = source.config
    width = min(source.family.gate_intermediate_size, config.hidden_size)
    gate_parameters = config.num_hidden_layers * width * (config.hidden_size + config.num_key_value_heads)
    shape = source.shape(0 if kind == "none" else gate_parameters)
    cache = CacheConfig(
        budget=parse_budget(request.budget, shape, request.buffer, request.dtype),
        buffer=request.buffer,
        prefill_chunk=request.prefill_chunk,
        policy=request.policy,
        sinks=request.sinks,
        recent=request.recent,
        min_per_head=request.min_per_head,
        threshold=request.threshold,
    )
    calibration = None
    if policy.pooled:
        request = replace(request, caps=request.caps or AUTO)
        if request.caps != AUTO:
            if request.caps_target is not None:
                raise ConfigError("--caps-target is for caps that the export calibrates: leave it out with --caps FILE")
            path = Path(request.caps or "")
            if parse_size(request.budget) is not None:  # the bytes are a limit, the entries come with the caps
                cache = replace(cache, budget=load_calibration(path).cache.budget)
            calibration = caps_from_file(path, cache, source)
            cache = calibration.cache
            check_budget(cache, shape, request.dtype, request.budget)
        elif request.caps_target is not None:
            check_request(cache, request.caps_target, request.dtype)
    elif request.caps is not None or request.caps_target is not None:
        raise ConfigError(
            f"--caps is for policies whose heads share a budget ({pooled_policies()}), not for {request.policy}"
        )
    if calibration or not policy.pooled:
        require_exportable(cache, config.num_hidden_layers, config.num_key_value_heads)
    memory = estimate_memory(shape, cache, request.dtype)
    if request.output.exists() and not request.force:
        raise ConfigError(f"{request.output} exists: choose another -o or give --force to replace it")
    return ExportPlan(request, source, shape, cache, memory, ops, (kind, gate_path), calibration)


def run_export(plan: ExportPlan, report: Report, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Exports and verifies every target; the output folder appears only when all of it is right.

    Args:
        plan: from :func:`plan_export`.
        report: called with one line per stage.
        progress: called during verification with (tokens done, tokens in all).

    Raises:
        BudgetError: the export would not fit in the memory at hand.
        TrimKVError: loading, exporting or verifying failed; the output is as it was.
    """
    request = plan.request
    plan.check_fits()
    report(f"loading {plan.source.name} ({plan.source.origin}) and its gates")
    loaded = load_model(plan.source, request.gates, request.rope, request.seed)
    plan = with_caps(plan, loaded, report)
    with new_folder(request.output) as folder:
        tokenizer = copy_tokenizer(plan.source.folder, folder, plan.source.config)
        if plan.calibration is not None:
            plan.calibration.save(folder / CAPS_FILE)
        targets: dict[str, Target] = {}
        for name, ops in plan.ops.items():
            report(f"exporting to {name} ({ops})")
            targets[name] = TARGETS[name].export(loaded.model, plan.config, folder, ops, tokenizer)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=loaded.info,
            gates=loaded.gates,
            cache=plan.config,
            rope=loaded.rope,
            tokenizer=tokenizer,
            dtype=request.dtype,
            quantization="none",
            bytes=ByteInfo(plan.memory.cache, 4 * loaded.info.parameters, plan.memory.peak),
            targets=targets,
            files=describe_files(folder),
            tools=tool_versions(),
        )
        manifest = verify_targets(manifest, loaded, folder, report, progress)
        manifest.save(folder)
    return manifest


def with_caps(plan: ExportPlan, loaded: LoadedModel, report: Report) -> ExportPlan:
    """The plan with the caps of its heads, calibrated now if they were not given; its memory is exact from here on.

    Raises:
        ConfigError: the caps are for other gates, or calibration failed.
        BudgetError: the bytes do not fit.
    """
    request = plan.request
    if request.caps is None:
        return plan
    calibration = plan.calibration
    if calibration is None:
        report(f"calibrating caps for a budget of {plan.config.budget} entries per head that all share")
        calibration = calibrate_within(
            loaded,
            plan.source,
            plan.shape,
            plan.config,
            budget=request.budget,
            target=request.caps_target,
            report=lambda line: report(f"  {line}"),
        )
    check_gates(calibration, loaded)
    config = calibration.cache
    memory = estimate_memory(plan.shape, config, request.dtype)
    plan = replace(plan, calibration=calibration, config=config, memory=memory)
    plan.check_fits()
    return plan


def verify_targets(
    manifest: Manifest,
    loaded: LoadedModel,
    folder: Path,
    report: Report,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Compares each target with the eager model and returns the manifest with the parity reports in it."""
    config = manifest.cache
    plan = stream_plan(config.budget, config.buffer, config.prefill_chunk, pooled=config.caps is not None)
    tokens = sample_tokens(folder, manifest, sum(plan))
    tolerance = load_tolerance(manifest.dtype)
    targets = {}
    for name, target in manifest.targets.items():
        report(f"verifying {name}: {sum(plan)} tokens, every survivor and greedy token against the eager model")
        reference = eager_engine(loaded.model, config, manifest.rope.position_limit)
        artefact = engine_class(name, config)(folder, manifest, target)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress:
                progress(done, sum(plan))

        result = compare(reference, artefact, tokens, plan, tolerance.score_rel, count)
        check(result, tolerance, f"the {name} artefact")
        targets[name] = replace(target, parity=result.as_dict())
    return replace(manifest, targets=targets)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape an artefact."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
