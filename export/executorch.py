"""The ExecuTorch target: ``model.pte``, one program whose methods share the cache's mutable buffers.

================= ============================================================ =======================================
``forward``       input_ids int64 [1, T], position int64 [1], live int64 [1]   logits float32 [1, 1, vocabulary],
                                                                               x_0, ..., x_{L-1} float32 [1, T, width]
``gates``         slot int64 [1], x_0, ..., x_{L-1}                            writes log-betas; returns ``slot``
``evict``         seen int64 [1]                                               the eviction event; returns ``seen``
``reset``                                                                      run once after loading, and per stream
``read_kept``                                                                  positions of the kept prefix
``write_kept``    as read                                                      replaces them
``read_state``    start int64 [1]                                              a block of slots, every layer
``write_state``   start, as read                                               replaces it
================= ============================================================ =======================================

T is the only dynamic size. ``x_l`` is what the gate of layer l reads of a chunk. A runner keeps it and calls ``gates``
before more than ``get_trimkv_gate_rows`` tokens wait, before ``evict`` and before ``read_state``; ``slot`` is the first
one's place in the cache. Where a policy needs no gates there is neither.

Where heads share a budget, ``live`` counts the tokens since the last event and some methods differ, see
:mod:`trimkv_edge.export.executorch_pooled`. All methods that a runner uses must be loaded before the first runs. Facts
about the model are constant methods with ExecuTorch's names (``get_vocab_size``, ``get_eos_ids``, ...) and
``get_trimkv_*``. Of a model that reads pictures ``forward`` takes rows instead of ids: see
:mod:`trimkv_edge.export.executorch_vision`.
"""

from __future__ import annotations

import logging
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram, export

from trimkv_edge.config import POSITION_LIMIT, CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import policy_of, require_exportable
from trimkv_edge.export.executorch_attention import CacheMethod, Forward, LlamaStep, PortableStep, Step
from trimkv_edge.export.executorch_cache import ExportCache, LlamaCache, PortableCache
from trimkv_edge.export.executorch_check import check_program
from trimkv_edge.export.executorch_gates import GATES, Gates, trace_gates
from trimkv_edge.export.executorch_parts import PackedParts
from trimkv_edge.export.executorch_pooled import PooledExportCache, PooledLlamaCache, PooledPortableCache
from trimkv_edge.export.executorch_pooled_attention import PooledLlamaStep, PooledPortableStep
from trimkv_edge.export.executorch_quantize import traceable
from trimkv_edge.export.executorch_vision import (
    VISION,
    RowsForward,
    decoder_part,
    picture_constants,
    trace_encoders,
    trace_rows,
)
from trimkv_edge.export.executorch_weights import LateWeights
from trimkv_edge.export.gates_apart import gates_apart, has_gates
from trimkv_edge.export.quantization import none
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import stored_bytes
from trimkv_edge.export.resume import RESUMABLE, Numbers, kept_folder, owned
from trimkv_edge.export.vision import check_sizes
from trimkv_edge.manifest import Target
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.skeleton import Weights, filled, model_weights
from trimkv_edge.policies.base import MODEL

PROGRAM = "model.pte"


class Form(NamedTuple):
    """The buffers of a program, and the step of its ``forward``: ``(cache, live or fill, T)``."""

    cache: Callable[[CacheConfig, int, int, int], ExportCache | PooledExportCache]
    step: Callable[[Any, Tensor, int], Step]


# By operator set: a budget for each head, and one that heads share.
FORMS = {
    "xnnpack": (Form(LlamaCache, LlamaStep), Form(PooledLlamaCache, PooledLlamaStep)),
    "portable": (Form(PortableCache, PortableStep), Form(PooledPortableCache, PooledPortableStep)),
}


def export_executorch(
    model: GatedModel,
    config: CacheConfig,
    folder: Path,
    *,
    ops: str = "xnnpack",
    scheme: Scheme = none.SCHEME,
    weights: Weights | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    metadata: dict[str, int | list[int]] | None = None,
    numbers: Numbers | None = None,
    progress: Callable[[str], None] | None = None,
) -> Target:
    """Writes ``model.pte``, and ``vision.pte`` of models that read pictures, into ``folder``, through temporary names.

    Args:
        model: float32, on the CPU; it may be hollow if ``weights`` are given.
        config: cache settings; they are constants of the program.
        folder: the artefact; made if missing.
        ops: ``xnnpack`` (XNNPACK delegate and ExecuTorch's llama operators) or ``portable`` (core kernels only).
        scheme: how weights are stored; all but ``none`` need ``xnnpack``.
        weights: the model's values by parameter name, read layer by layer; by default those it has.
        sizes: of pictures, (patches down, patches across), for a :class:`GatedVisionModel`.
        metadata: more constant methods, such as ``get_eos_ids``.
        numbers: how far packing is, and whether weights that an interrupted export packed are used; tracing and
            lowering are done again.
        progress: called with one line per stage.

    Raises:
        ConfigError: unknown ``ops``, or a setting that this target does not export.
        VerificationError: the program would compute wrongly or copy the cache.
    """
    check_settings(model, config, ops, scheme)
    check_sizes(model, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = numbers or Numbers()
    with (
        tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as scratch,
        owned(_kept(model, config, ops, scheme, numbers), numbers.restart) as kept,
    ):
        program = build_program(
            model,
            config,
            ops=ops,
            scheme=scheme,
            weights=weights,
            sizes=sizes,
            metadata=metadata,
            numbers=numbers,
            progress=progress,
            parts=PackedParts(kept or Path(scratch), keep=kept is not None),
        )
        files = {"program": PROGRAM}
        _write(program, Path(scratch) / PROGRAM)
        if isinstance(model, GatedVisionModel):
            del program  # XNNPACK's bytes of the decoder
            files["vision"] = VISION
            parts = PackedParts(Path(scratch))
            encoder = build_vision(model, sizes, ops=ops, weights=weights, progress=progress, parts=parts)
            _write(encoder, Path(scratch) / VISION)
        for name in files.values():
            os.replace(Path(scratch) / name, folder / name)
        if kept is not None:
            shutil.rmtree(kept)
    return Target("executorch", ops, files)


def _write(program: Any, path: Path) -> None:
    with path.open("wb") as stream:
        program.write_to_file(stream)


def build_program(
    model: GatedModel,
    config: CacheConfig,
    *,
    ops: str = "xnnpack",
    scheme: Scheme = none.SCHEME,
    weights: Weights | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    metadata: dict[str, int | list[int]] | None = None,
    numbers: Numbers | None = None,
    progress: Callable[[str], None] | None = None,
    parts: PackedParts | None = None,
) -> Any:
    """The program before it is saved, an ``ExecutorchProgramManager``; arguments as for :func:`export_executorch`.

    ``parts``: where packed weights are until the program is saved; by default in memory.
    """
    check_settings(model, config, ops, scheme)
    weights = weights or model_weights(model)
    numbers, parts = numbers or Numbers(), parts or PackedParts()
    metadata = dict(metadata or {})
    with _quiet():
        if isinstance(model, GatedVisionModel):
            metadata |= picture_constants(model, sizes)
            model = decoder_part(model)
        if ops == "xnnpack":
            traced = traceable(model, weights, scheme)
            model, late = traced.model, LateWeights(traced.late, "model", parts, numbers.progress)
        else:
            model, late = filled(model, weights), LateWeights({}, "model", parts)
        if done := parts.done():
            numbers.go_on(done, late.total)
        program = _lower(model, late, config, ops, metadata, progress or (lambda _: None))
    check_program(program, ops)
    return program


def build_vision(
    model: GatedVisionModel,
    sizes: Sequence[tuple[int, int]],
    *,
    ops: str = "xnnpack",
    weights: Weights | None = None,
    progress: Callable[[str], None] | None = None,
    parts: PackedParts | None = None,
) -> Any:
    """The program of the vision encoder before it is saved; arguments as for :func:`build_program`. Its weights are
    float32, whatever the decoder's are."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    check_sizes(model, sizes)
    (progress or (lambda _: None))("executorch: vision encoder")
    with _quiet():
        traced = trace_encoders(model, weights or model_weights(model), sizes, late=ops == "xnnpack")
        late = LateWeights(traced.late, "visual", parts or PackedParts())
        with late.packing():
            lowered = to_edge_transform_and_lower(
                traced.programs,
                partitioner={name: partitioners(ops) for name in traced.programs},
                constant_methods=picture_constants(model, sizes),
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
        for name in traced.programs:
            late.fill(lowered.exported_program(name))
        late.check_used(traced.visual)
        program = lowered.to_executorch()
    if ops == "portable":
        check_program(program, ops)
    return program


def _kept(model: GatedModel, config: CacheConfig, ops: str, scheme: Scheme, numbers: Numbers) -> Path | None:
    """Where packed weights outlive an interruption; None if they are few or have no key."""
    if ops != "xnnpack" or not numbers.key or stored_bytes(model, scheme) < RESUMABLE:
        return None
    return kept_folder("executorch", numbers.key, asdict(config))


def check_settings(model: GatedModel, config: CacheConfig, ops: str, scheme: Scheme) -> None:
    """Raises :class:`~trimkv_edge.errors.ConfigError` for what this target cannot build."""
    if ops not in FORMS:
        raise ConfigError(f"executorch operators {ops!r} are not known; use one of {', '.join(FORMS)}")
    if "executorch" not in scheme.targets:
        raise ConfigError(
            f"executorch has no kernels for {scheme.name} weights on CPUs: use --quant 8da4w (both targets know it) "
            "or --target onnx"
        )
    if ops != "xnnpack" and scheme.name != none.SCHEME.name:
        raise ConfigError(
            f"executorch's {ops} kernels have no {scheme.name} weights: use --ops xnnpack or --quant none"
        )
    require_exportable(config, model.config.num_hidden_layers, model.config.num_key_value_heads)


def _lower(
    model: GatedModel,
    late: LateWeights,
    config: CacheConfig,
    ops: str,
    metadata: dict[str, int | list[int]],
    say: Callable[[str], None],
) -> Any:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    if ops == "xnnpack":
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers the operators)
    shape = model.config
    form = FORMS[ops][config.caps is not None]
    cache = form.cache(config, shape.num_hidden_layers, shape.num_key_value_heads, model.head_dim)
    say("executorch: graphs")
    programs = trace_methods(cache, model.eval(), form.step)
    say("executorch: lowering")
    heavy = [name for name in ("forward", GATES) if name in programs]
    with late.packing():
        lowered = to_edge_transform_and_lower(
            programs,
            partitioner={name: partitioners(ops) if name in heavy else [] for name in programs},
            constant_methods=_constants(model, config, metadata),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    # Layers that XNNPACK did not take.
    for name in heavy:
        late.fill(lowered.exported_program(name))
    late.check_used(model)
    say("executorch: program")
    return lowered.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
            emit_mutable_buffer_names=True,
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch, torchao and ExecuTorch say about each other's deprecations and missing CUDA libraries."""
    noisy = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def trace_methods(
    cache: ExportCache | PooledExportCache, model: GatedModel, step: Callable[[Any, Tensor, int], Step]
) -> dict[str, ExportedProgram]:
    """``torch.export`` of every method over one cache."""
    most, gated = cache.config.prefill_chunk, has_gates(model)
    with torch.no_grad():
        with gates_apart(model):
            if isinstance(model, GatedVisionModel):
                programs = trace_rows(RowsForward(model, cache, step, gated=gated), most)
            else:
                programs = {"forward": _trace_forward(Forward(model, cache, step, gated=gated), most)}
        if gated:
            programs[GATES] = trace_gates(Gates(model, cache), model.config.hidden_size)
        for name, args in cache.examples().items():
            programs[name] = export(CacheMethod(cache, name), args, strict=False)
    return programs


def _trace_forward(forward: Forward, most: int) -> ExportedProgram:
    number, chunk = torch.zeros(1, dtype=torch.int64), min(most, 3)
    tokens = {1: Dim("T", min=1, max=most)} if chunk > 1 else None
    return export(
        forward,
        (torch.zeros(1, chunk, dtype=torch.int64), number, number.clone()),
        dynamic_shapes=(tokens, None, None),
        strict=False,
    )


def partitioners(ops: str) -> list[Any]:
    """What takes over parts of ``forward`` and ``gates``: XNNPACK, but for views of the cache, ``exp`` and ``gelu``;
    ``portable``: nothing."""
    if ops == "portable":
        return []
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import ExpConfig, GeluConfig, ViewCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, tag_as_implicit_q_dq

    class ActivationViews(ViewCopyConfig):  # type: ignore[misc]
        """XNNPACK copies what it reshapes: a view of the cache in a delegate would copy the cache in every step."""

        def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
            return not _is_state(node.all_input_nodes[0]) and bool(super().check_constraints(node, ep))

    class LinearOrWeightOnly(LinearConfig):  # type: ignore[misc]
        """XNNPACK multiplies float32 activations with 8-bit weights too, which ExecuTorch's own rules leave out."""

        def get_deps(self, node: torch.fx.Node, ep: ExportedProgram) -> tuple[bool, list[torch.fx.Node]]:
            activation, weight = node.all_input_nodes[:2]
            if not is_dequant(weight) or is_dequant(activation):
                return super().get_deps(node, ep)
            tag_as_implicit_q_dq(weight)
            return True, [weight, *weight.all_input_nodes]

    # XNNPACK's exp is off by up to 4e-6 (relative, growing with |x|); it would blur the ranking of log-betas. Its gelu
    # moves a vision encoder's rows by up to 6e-4, all else by 1e-5 at most.
    replaced = (ExpConfig, GeluConfig, ViewCopyConfig, LinearConfig)
    configs = [config for config in ALL_PARTITIONER_CONFIGS if config not in replaced]
    return [XnnpackPartitioner(configs=[*configs, ActivationViews, LinearOrWeightOnly])]


def _is_state(node: torch.fx.Node) -> bool:
    """Whether a value is a buffer, or what an operator that updates one (functional at this stage) returned."""
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or isinstance(node.target, HigherOrderOperator)


def _constants(model: GatedModel, config: CacheConfig, more: dict[str, int | list[int]]) -> dict[str, Any]:
    shape = model.config
    return {
        "get_vocab_size": shape.vocab_size,
        "get_n_layers": shape.num_hidden_layers,
        "get_head_dim": model.head_dim,
        "get_n_kv_heads": shape.num_key_value_heads,
        "get_max_seq_len": config.prefill_chunk,
        "get_max_context_len": POSITION_LIMIT,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": config.prefill_chunk > 1,
        "get_trimkv_budget": config.budget,
        "get_trimkv_buffer": config.buffer,
        "get_trimkv_prefill_chunk": config.prefill_chunk,
        "get_trimkv_sinks": config.sinks,
        "get_trimkv_recent": config.recent,
        **_shared_budget(config),
        **_waiting_rows(model, config),
        **more,
    }


def _waiting_rows(model: GatedModel, config: CacheConfig) -> dict[str, Any]:
    """What a runner has to know to keep what gates read."""
    if not has_gates(model):
        return {}
    return {"get_trimkv_gate_rows": config.gate_rows, "get_trimkv_hidden_size": model.config.hidden_size}


def _shared_budget(config: CacheConfig) -> dict[str, Any]:
    """What a runner has to know of a budget that heads share; nothing if each head has its own."""
    if config.caps is None:
        return {}
    return {
        "get_trimkv_caps": [cap for heads in config.caps for cap in heads],
        "get_trimkv_min_per_head": config.min_per_head,
        "get_trimkv_threshold": config.threshold,
        "get_trimkv_pools": 1 if policy_of(config).scope == MODEL else len(config.caps),
    }
