"""The ExecuTorch target: ``model.pte``, one program whose methods share the cache's mutable buffers.

================= ============================================================ =======================================
``forward``       input_ids int64 [1, T], position int64 [1], live int64 [1]   logits float32 [1, 1, vocabulary]
``evict``         seen int64 [1]                                               the eviction event; returns ``seen``
``reset``                                                                      run once after loading, and per stream
``read_kept``                                                                  positions of the kept prefix
``write_kept``    as read                                                      replaces them
``read_state``    start int64 [1]                                              a block of slots, every layer
``write_state``   start, as read                                               replaces it
================= ============================================================ =======================================

T is the only dynamic size. Where heads share a budget, ``live`` counts the tokens since the last event and some methods
differ, see :mod:`trimkv_edge.export.executorch_pooled`. All methods that a runner uses must be loaded before the first
runs. Facts about the model are constant methods with ExecuTorch's names (``get_vocab_size``, ``get_eos_ids``, ...) and
``get_trimkv_*``.
"""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from trimkv_edge.export.executorch_pooled import PooledExportCache, PooledLlamaCache, PooledPortableCache
from trimkv_edge.export.executorch_pooled_attention import PooledLlamaStep, PooledPortableStep
from trimkv_edge.manifest import Target
from trimkv_edge.models.gated import GatedModel
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
    metadata: dict[str, int | list[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Target:
    """Writes ``model.pte`` into ``folder``, through a temporary name.

    Args:
        model: float32, on the CPU.
        config: cache settings; they are constants of the program.
        folder: the artefact; made if missing.
        ops: ``xnnpack`` (XNNPACK delegate and ExecuTorch's llama operators) or ``portable`` (core kernels only).
        metadata: more constant methods, such as ``get_eos_ids``.
        progress: called with one line per stage.

    Raises:
        ConfigError: unknown ``ops``, or a setting that this target does not export.
        VerificationError: the program would compute wrongly or copy the cache.
    """
    program = build_program(model, config, ops=ops, metadata=metadata, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{PROGRAM}.tmp"
    try:
        with temporary.open("wb") as stream:
            program.write_to_file(stream)
        os.replace(temporary, folder / PROGRAM)
    finally:
        temporary.unlink(missing_ok=True)
    return Target("executorch", ops, {"program": PROGRAM})


def build_program(
    model: GatedModel,
    config: CacheConfig,
    *,
    ops: str = "xnnpack",
    metadata: dict[str, int | list[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """The program before it is saved, an ``ExecutorchProgramManager``; arguments as for :func:`export_executorch`."""
    if ops not in FORMS:
        raise ConfigError(f"executorch operators {ops!r} are not known; use one of {', '.join(FORMS)}")
    require_exportable(config, model.config.num_hidden_layers, model.config.num_key_value_heads)
    with _quiet():
        program = _lower(model, config, ops, metadata or {}, progress or (lambda _: None))
    check_program(program, ops)
    return program


def _lower(
    model: GatedModel, config: CacheConfig, ops: str, metadata: dict[str, int | list[int]], say: Callable[[str], None]
) -> Any:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    if ops == "xnnpack":
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers the operators)
    shape = model.config
    form = FORMS[ops][config.caps is not None]
    cache = form.cache(config, shape.num_hidden_layers, shape.num_key_value_heads, model.head_dim)
    say("executorch: graphs")
    programs = trace_methods(cache, Forward(model.eval(), cache, form.step))
    say("executorch: lowering")
    lowered = to_edge_transform_and_lower(
        programs,
        partitioner={name: partitioners(ops) if name == "forward" else [] for name in programs},
        constant_methods=_constants(model, config, metadata),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
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


def trace_methods(cache: ExportCache | PooledExportCache, forward: Forward) -> dict[str, ExportedProgram]:
    """``torch.export`` of every method over one cache."""
    most = cache.config.prefill_chunk
    number = torch.zeros(1, dtype=torch.int64)
    chunk = min(most, 3)
    tokens = {1: Dim("T", min=1, max=most)} if chunk > 1 else None
    with torch.no_grad():
        programs = {
            "forward": export(
                forward,
                (torch.zeros(1, chunk, dtype=torch.int64), number, number.clone()),
                dynamic_shapes=(tokens, None, None),
                strict=False,
            )
        }
        for name, args in cache.examples().items():
            programs[name] = export(CacheMethod(cache, name), args, strict=False)
    return programs


def partitioners(ops: str) -> list[Any]:
    """What takes over parts of ``forward``: XNNPACK, but for views of the cache and ``exp``; ``portable``: nothing."""
    if ops == "portable":
        return []
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import ExpConfig, ViewCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class ActivationViews(ViewCopyConfig):  # type: ignore[misc]
        """XNNPACK copies what it reshapes: a view of the cache in a delegate would copy the cache in every step."""

        def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
            return not _is_state(node.all_input_nodes[0]) and bool(super().check_constraints(node, ep))

    # XNNPACK's exp is off by up to 4e-6 (relative, growing with |x|); it would blur the ranking of log-betas.
    configs = [config for config in ALL_PARTITIONER_CONFIGS if config not in (ExpConfig, ViewCopyConfig)]
    return [XnnpackPartitioner(configs=[*configs, ActivationViews])]


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
        **more,
    }


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
