"""From a request to a finished artefact folder: plan, load, export each target, verify, write the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimkv_edge.budget import (
    MemoryEstimate,
    ModelShape,
    check_budget,
    check_fits,
    estimate_memory,
    held_as_float32,
    parse_budget,
    parse_size,
)
from trimkv_edge.calibration.request import check_request
from trimkv_edge.caps import CAPS_FILE, Calibration, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import find_policy, pooled_policies, require_exportable
from trimkv_edge.export.caps import AUTO, calibrate_within, caps_from_file, check_gates
from trimkv_edge.export.card import write_card
from trimkv_edge.export.check_artefact import verify_targets
from trimkv_edge.export.estimate import ExportCost, estimate
from trimkv_edge.export.heap import give_back
from trimkv_edge.export.kv_ranges import SAMPLE_TOKENS, measure_scales
from trimkv_edge.export.quantization import check_kv_dtype, find_scheme
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import gate_parameters, gated_outline, stored_bytes
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.export.targets import TARGETS, Job, check_ops
from trimkv_edge.export.tokenizer import copy_tokenizer, sample_tokens
from trimkv_edge.export.verify import MIN_EVENTS
from trimkv_edge.export.vision import vision_info
from trimkv_edge.files import new_folder
from trimkv_edge.hexagon import check_shards, find_soc
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.manifest import (
    SCHEMA_VERSION,
    ByteInfo,
    Manifest,
    Target,
    TokenizerInfo,
    VisionInfo,
    describe_files,
)
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.loading import LoadedModel, choose_gates, gates_for, load_model
from trimkv_edge.models.rope import choose_rope
from trimkv_edge.models.skeleton import filled
from trimkv_edge.models.source import ModelSource, find_source
from trimkv_edge.policies.base import Policy

_FLOAT = 4
_TOOLS = (
    "trimkv-edge",
    "torch",
    "torchao",
    "transformers",
    "executorch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-qnn",
    "tokenizers",
)


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
    quant: str = "none"
    embedding_bits: int | None = None
    kv_dtype: str | None = None
    rope: str = "auto"
    stream_length: int | None = None
    soc: str | None = None
    shards: int | None = None
    image_sizes: tuple[str, ...] = ()
    weights: Path | None = None
    random_weights: bool = False
    seed: int = 0
    restart: bool = False
    force: bool = False


@dataclass(frozen=True)
class ExportPlan:
    """A request whose settings were checked, and what it will cost.

    Attributes:
        config: without caps where heads share a budget and they are calibrated by the export itself.
        gates: kind and file.
        outline: the gated model's sizes, without memory.
        calibration: what a caps file says.
        vision: of a model that reads pictures.
    """

    request: ExportRequest
    source: ModelSource
    shape: ModelShape
    config: CacheConfig
    memory: MemoryEstimate
    ops: dict[str, str]
    gates: tuple[str, Path | None]
    scheme: Scheme
    outline: GatedModel
    calibration: Calibration | None = None
    vision: VisionInfo | None = None

    @cached_property
    def cost(self) -> ExportCost:
        """What the export itself is estimated to take."""
        return estimate(
            self.shape,
            self.config,
            self.request.targets,
            self.scheme,
            stored=self.memory.weights,
            cache=self.memory.cache,
            largest=_FLOAT * max(parameter.numel() for parameter in self.outline.parameters()),
            gates=_FLOAT * gate_parameters(self.outline),
        )

    def check_fits(self) -> None:
        """Raises :class:`~trimkv_edge.errors.BudgetError` if the export needs more memory than is available."""
        check_fits(self.cost.memory, f"exporting {self.request.model} with a budget of {self.config.budget}")


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
    scheme = find_scheme(request.quant, request.targets, request.embedding_bits)
    kv_dtype = _kv_dtype(request, policy, scheme, ops)
    source = find_source(request.model, request.weights, request.random_weights, vision=True)
    vision = _vision(request, source)
    rope = choose_rope(source.config, request.rope, request.stream_length)
    request = replace(request, gates=gates_for(policy, source, request.gates))
    kind, gate_path = choose_gates(source, request.gates)
    outline = gated_outline(source, kind)
    shape = source.shape(gate_parameters(outline))
    cache = CacheConfig(
        budget=parse_budget(request.budget, shape, request.buffer, kv_dtype),
        buffer=request.buffer,
        prefill_chunk=request.prefill_chunk,
        policy=request.policy,
        sinks=request.sinks,
        recent=request.recent,
        min_per_head=request.min_per_head,
        threshold=request.threshold,
        kv_dtype=kv_dtype,
    )
    for target in request.targets:
        TARGETS[target].check(cache)
    for option, given, what in (("soc", request.soc, "a chip"), ("shards", request.shards, "parts of a graph")):
        if given is not None and "npu:hexagon" not in request.targets:
            raise ConfigError(f"--{option} is {what} of --target npu:hexagon: leave it out, or add that target")
    if request.soc is not None:
        find_soc(request.soc)
    if request.shards is not None:
        check_shards(request.shards, shape.num_layers)
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
        require_exportable(cache, shape.num_layers, shape.num_kv_heads)
    needed = cache.budget + (MIN_EVENTS + 1) * cache.buffer
    if rope.variant == "short" and needed > rope.position_limit:
        raise ConfigError(
            f"a budget of {cache.budget} with a buffer of {cache.buffer} takes up to {needed} tokens to verify, but "
            f"{rope.variant} LongRoPE factors are right for {rope.position_limit}: lower --budget or --buffer, or use "
            "--rope long"
        )
    memory = _memory_to_run(request, shape, cache, scheme, stored_bytes(outline, scheme))
    if request.output.exists() and not request.force:
        raise ConfigError(f"{request.output} exists: choose another -o or give --force to replace it")
    return ExportPlan(
        request, source, shape, cache, memory, ops, (kind, gate_path), scheme, outline, calibration, vision
    )


def _vision(request: ExportRequest, source: ModelSource) -> VisionInfo | None:
    """How a model reads pictures, if it does.

    Raises:
        ConfigError: picture sizes for a text model, or a target that has no pictures.
    """
    if not source.family.vision:
        if request.image_sizes:
            raise ConfigError(f"--image-sizes is for models that read pictures, and {request.model} reads text only")
        return None
    without = [name for name in request.targets if not TARGETS[name].vision]
    if without:
        able = ", ".join(name for name, target in TARGETS.items() if target.vision)
        raise ConfigError(
            f"--model {request.model} reads pictures, and target {', '.join(without)} runs text models only: use {able}"
        )
    return vision_info(source, request.image_sizes)


def _memory_to_run(
    request: ExportRequest, shape: ModelShape, config: CacheConfig, scheme: Scheme, stored: int
) -> MemoryEstimate:
    memory = replace(estimate_memory(shape, config, request.dtype), weights=stored)
    packed = 0
    if scheme.dtype == "float16":
        # A CPU multiplies float32: copies of all weights, or of the largest matrix, before and after packing.
        largest = 4 * shape.vocab_size * shape.hidden_size
        packed = stored if held_as_float32(scheme.dtype, stored) else 2 * largest
    elif "onnx" in request.targets and scheme.weight_bits < 16:
        # ONNX Runtime packs blocks of 32 with their scale and a sum, which the file does not have.
        packed = shape.parameters * 4 // 32
    return replace(memory, workspace=memory.workspace + packed)


def _kv_dtype(request: ExportRequest, policy: Policy, scheme: Scheme, ops: dict[str, str]) -> str:
    """How keys and values are stored: as asked for, else as the scheme computes.

    Raises:
        ConfigError: not known, or the scheme, a target, its operators or the policy cannot have them so.
    """
    chosen = scheme.kv_dtypes[0] if request.kv_dtype is None else request.kv_dtype
    check_kv_dtype(scheme, chosen)
    for target in request.targets:
        if chosen not in TARGETS[target].kv_dtypes:
            raise ConfigError(
                f"{target} keeps {' or '.join(TARGETS[target].kv_dtypes)} keys and values: leave out --kv-dtype, or "
                f"the target"
            )
    option = f"--quant {scheme.name}" if chosen in ("float16", "bfloat16") else "--kv-dtype"
    if chosen != "float32" and (policy.pooled or policy.key_score):
        raise ConfigError(
            f"policy {policy.name} needs float32 keys and values: leave out {option}, or use another policy"
        )
    if chosen != "float32" and ops.get("onnx") == "standard":
        raise ConfigError(f"--onnx-ops standard keeps float32 keys and values only: use gqa, or leave out {option}")
    return chosen


def run_export(plan: ExportPlan, report: Report, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Exports and verifies every target; the output folder appears only when all of it is right.

    Args:
        plan: from :func:`plan_export`.
        report: called with one line per stage.
        progress: called in long stages with (done, in all): bytes of weights, layers of the reference, tokens compared.

    Raises:
        BudgetError: the export would not fit in the memory at hand.
        TrimKVError: loading, exporting or verifying failed; the output is as it was.
    """
    request = plan.request
    plan.check_fits()

    def detail(line: str) -> None:
        report(f"  {line}")

    report(f"loading {plan.source.name} ({plan.source.origin}) and its gates")
    loaded = load_model(
        plan.source, request.gates, request.rope, request.seed, stream_length=request.stream_length, hollow=True
    )
    plan = with_caps(plan, loaded, report)
    with new_folder(request.output) as folder:
        tokenizer = copy_tokenizer(plan.source.folder, folder, plan.source.text_config)
        if plan.calibration is not None:
            plan.calibration.save(folder / CAPS_FILE)
        scales = _scales(plan, loaded, folder, tokenizer, detail, progress)
        targets: dict[str, Target] = {}
        for name, ops in plan.ops.items():
            report(f"exporting to {name} ({ops})")
            targets[name] = TARGETS[name].export(
                Job(
                    model=loaded.model,
                    weights=loaded.weights,
                    config=plan.config,
                    folder=folder,
                    ops=ops,
                    scheme=plan.scheme,
                    tokenizer=tokenizer,
                    scales=scales,
                    key=_key(plan, loaded),
                    restart=request.restart,
                    say=detail,
                    progress=progress,
                    soc=request.soc,
                    shards=request.shards,
                    sizes=() if plan.vision is None else plan.vision.sizes,
                )
            )
            give_back()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=loaded.info,
            gates=loaded.gates,
            cache=plan.config,
            rope=loaded.rope,
            tokenizer=tokenizer,
            dtype=plan.scheme.dtype,
            quantization=plan.scheme.name,
            bytes=ByteInfo(plan.memory.cache, stored_bytes(loaded.model, plan.scheme), plan.memory.peak),
            targets=targets,
            files=describe_files(folder),
            tools=tool_versions(),
            embedding_bits=request.embedding_bits,
            vision=plan.vision,
        )
        manifest = verify_targets(manifest, loaded, folder, report, progress, scales)
        manifest = write_card(manifest, folder)
        manifest.save(folder)
    return manifest


def _scales(
    plan: ExportPlan,
    loaded: LoadedModel,
    folder: Path,
    tokenizer: TokenizerInfo | None,
    say: Report,
    progress: Callable[[int, int], None] | None,
) -> KVScales | None:
    """Scales of int8 keys and values, if they are stored so."""
    if plan.config.kv_dtype != "int8":
        return None
    say("scales of int8 keys and values")
    (target,) = plan.ops
    weights = ReferenceWeights(loaded.model, loaded.weights, plan.scheme, TARGETS[target].rounding)
    # Text from far from where verification reads, and any tokens: a tokenizer may know few of the sample's words.
    text = sample_tokens(folder, tokenizer, loaded.info.vocab_size, 16 * SAMPLE_TOKENS)[-SAMPLE_TOKENS:]
    mixed = sample_tokens(folder, None, loaded.info.vocab_size, 2 * SAMPLE_TOKENS)[-SAMPLE_TOKENS:]
    return measure_scales(weights, text + mixed, progress)


def _key(plan: ExportPlan, loaded: LoadedModel) -> str:
    """What the artefact's numbers follow from."""
    parts = [loaded.info.weights_sha256, plan.request.seed, asdict(loaded.gates), asdict(plan.scheme), tool_versions()]
    return json.dumps(parts)


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
        loaded = replace(loaded, model=filled(loaded.model, loaded.weights))
        report(f"calibrating caps for a budget of {plan.config.budget} entries per head that all share")
        calibration = calibrate_within(
            loaded,
            plan.source,
            plan.shape,
            plan.config,
            budget=request.budget,
            vision=plan.vision,
            target=request.caps_target,
            report=lambda line: report(f"  {line}"),
        )
    check_gates(calibration, loaded)
    config = calibration.cache
    memory = _memory_to_run(request, plan.shape, config, plan.scheme, plan.memory.weights)
    plan = replace(plan, calibration=calibration, config=config, memory=memory)
    plan.check_fits()
    return plan


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape an artefact."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
