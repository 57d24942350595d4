"""The ONNX target: ``decoder.onnx`` (a chunk of tokens over the bounded cache), ``gates.onnx`` (their log-betas, see
:mod:`trimkv_edge.export.onnx_gates`) and ``evict.onnx`` (the event).

State tensors are inputs ``past.X`` and outputs ``present.X``, made so that a runtime may bind one buffer to both:

============== ======================================= ====================================================
``{i}.key``    kv_dtype ``[1, kv_heads, M + B, head_dim]`` layer i, after RoPE; ``{i}.value`` alike
``log_beta``   float32 ``[M + B, layers * kv_heads]``    column = layer * kv_heads + head
``positions``  int64 ``[layers * kv_heads, M]``          of the kept prefix, evict only; the ring's follow from ``seen``
============== ======================================= ====================================================

The decoder also reads ``input_ids`` int64 ``[1, T]``, ``position`` int64 ``[1]`` (of the first token) and
``live_length`` int64 ``[1]``, and gives ``logits`` float32 ``[1, 1, vocabulary]`` and per layer what its gate reads,
``gate_input.{i}`` float32 ``[1, T, hidden_size]``. T is its only dynamic axis. With plain operators and for GPUs there
is no ``gates.onnx``: the decoder runs the gates and has ``log_beta`` as state.
Where heads share a budget, heads have tensors of their own: see :mod:`trimkv_edge.export.onnx_pooled`. Of a model that
reads pictures it takes rows instead of ids: see :mod:`trimkv_edge.export.onnx_vision`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.eviction import policy_of, require_exportable
from trimkv_edge.export.gates_apart import gates_apart
from trimkv_edge.export.onnx_attention import BACKENDS, GroupQueryAttention, OnnxAttention
from trimkv_edge.export.onnx_chunks import Reader, RowsReader, TextReader
from trimkv_edge.export.onnx_data import save_with_data
from trimkv_edge.export.onnx_evict import evict_model
from trimkv_edge.export.onnx_gates import (
    Gates,
    deferred_sigmoid,
    may_wait,
    trace_gates,
    write_log_betas,
)
from trimkv_edge.export.onnx_lint import lint, lint_standard
from trimkv_edge.export.onnx_norms import fuse_skip_norms
from trimkv_edge.export.onnx_pooled import POOLED_BACKENDS, PooledAttention, table_width
from trimkv_edge.export.onnx_pooled_evict import pooled_evict_model
from trimkv_edge.export.onnx_prefill import LONGEST_DIRECT, branch_long_chunks
from trimkv_edge.export.onnx_reshapes import drop_round_trips
from trimkv_edge.export.onnx_rewrite import clean, divide_by_roots
from trimkv_edge.export.onnx_rotary import fused_rotary
from trimkv_edge.export.onnx_trace import trace
from trimkv_edge.export.onnx_vision import check_scheme, save_embed, save_vision
from trimkv_edge.export.onnx_weights import fill, prepare
from trimkv_edge.export.quantization import SCHEMES, check_kv_dtype
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.resume import Numbers
from trimkv_edge.export.vision import check_sizes
from trimkv_edge.kv_scales import KVScales
from trimkv_edge.manifest import Target
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.skeleton import Weights, model_weights

DECODER, DECODER_DATA, EVICT, SCALES = "decoder.onnx", "decoder.onnx.data", "evict.onnx", "kv_scales.npz"
GATES, GATES_DATA = "gates.onnx", "gates.onnx.data"
_GRAPHS = {"decoder": (DECODER, DECODER_DATA), "gates": (GATES, GATES_DATA)}
# 18 is the lowest opset that torch's exporter writes natively and has every operator used here, so the standard variant
# loads in any runtime that knows plain ONNX operators; 20 is what GroupQueryAttention was verified with.
_OPSETS = {"gqa": 20, "standard": 18}


def export_onnx(
    model: GatedModel,
    config: CacheConfig,
    folder: Path,
    *,
    ops: str = "gqa",
    scheme: Scheme = SCHEMES["none"],
    weights: Weights | None = None,
    scales: KVScales | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    progress: Callable[[str], None] | None = None,
) -> Target:
    """Writes the graphs and their external data into ``folder``, each through a temporary name.

    Args:
        model: float32, on the CPU; hollow if ``weights`` are given.
        config: cache settings; they are constants of the graphs.
        folder: the artefact; made if missing.
        scheme: how weights are stored.
        weights: where they come from, one at a time; default: the model itself.
        scales: of int8 keys and values.
        sizes: of pictures, (patches down, patches across), for a :class:`GatedVisionModel`.
        numbers: how packing them is reported and gone on with.
        ops: ``gqa`` (``com.microsoft::GroupQueryAttention``, fastest in ONNX Runtime) or ``standard`` (operators of the
            ONNX domain only).
        progress: called with one line per stage.

    Raises:
        ConfigError: unknown ``ops``, or a setting that this target does not export (look-ahead, no caps).
        VerificationError: a graph is not safe to run in place.
    """
    if ops not in BACKENDS:
        raise ConfigError(f"onnx operators {ops!r} are not known; use one of {', '.join(BACKENDS)}")
    say = progress or (lambda _: None)
    shape = model.config
    if ops == "standard" and scheme.weight_bits < 32:
        raise ConfigError(
            f"--onnx-ops standard has no {scheme.weight_bits}-bit matrix product: use gqa, or --quant none"
        )
    check_kv_dtype(scheme, config.kv_dtype)
    _check_kv_dtype(config, ops, scales)
    check_sizes(model, sizes)
    if isinstance(model, GatedVisionModel):
        check_scheme(scheme)
    check = lint_standard if ops == "standard" else lint
    say("onnx: evict graph")
    evict = _evict_model(config, shape.num_hidden_layers, shape.num_key_value_heads, model.head_dim)
    _require_safe(EVICT, lint_standard(evict))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as temporary:
        # Same file names in another folder: the decoder names its data file relative to itself.
        work = Path(temporary)
        say("onnx: decoder graph")
        prepared = prepare(model.eval(), weights or model_weights(model), scheme)
        waiting = may_wait(prepared, config, ops)
        _save_decoder(prepared, config, ops, scales, waiting, work / DECODER, numbers, say)
        more: dict[str, str] = {}
        if waiting:
            say("onnx: gates")
            _save_gates(prepared, config, _OPSETS[ops], work / GATES, numbers)
            more |= {"gates": GATES, "gates_data": GATES_DATA}
        if isinstance(prepared, GatedVisionModel):
            say("onnx: embeddings")
            more |= save_embed(prepared, config.prefill_chunk, work, _OPSETS[ops])
            more |= save_vision(prepared, weights or model_weights(model), sizes, work, _OPSETS[ops], say)
        onnx.save(evict, work / EVICT)
        say("onnx: checks")
        for name in (DECODER, *([GATES] if waiting else [])):
            graph = onnx.load(work / name, load_external_data=False)
            clean(graph)
            divide_by_roots(graph)
            onnx.save(graph, work / name)
            onnx.checker.check_model(work / name)
            _require_safe(name, check(graph))
        files = {"decoder": DECODER, "decoder_data": DECODER_DATA, "evict": EVICT, **more}
        for name in files.values():
            os.replace(work / name, folder / name)
    if scales:
        scales.save(folder / SCALES)
        files["kv_scales"] = SCALES
    return Target("onnx", ops, files)


def _check_kv_dtype(config: CacheConfig, ops: str, scales: KVScales | None) -> None:
    if config.kv_dtype == "float32":
        return
    if ops != "gqa":
        raise ConfigError(f"--onnx-ops {ops} keeps float32 keys and values only: use gqa, or --kv-dtype float32")
    if config.caps is not None or policy_of(config).key_score:
        raise ConfigError(
            f"policy {config.policy} needs float32 keys and values: use --kv-dtype float32, or a policy that neither "
            "shares a budget nor looks at keys"
        )
    if config.kv_dtype == "int8" and scales is None:
        raise ConfigError("int8 keys and values need scales: measure them first (trimkv_edge.export.kv_ranges)")


def with_float_activations(folder: Path, target: Target, scratch: Path) -> Target:
    """The same target with graphs that compute in float32 instead of rounding activations to int8, to verify with.

    Args:
        folder: the artefact.
        scratch: a folder inside it for the graphs; the weights stay where they are.
    """
    files = dict(target.files)
    for role, (name, data) in _GRAPHS.items():
        if role not in files:
            continue
        model = onnx.load(folder / files[role], load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        (scratch / data).hardlink_to(folder / files[f"{role}_data"])
        onnx.save(model, scratch / name)
        files[role] = str((scratch / name).relative_to(folder))
    return replace(target, files=files)


def _evict_model(config: CacheConfig, layers: int, heads: int, head_dim: int) -> onnx.ModelProto:
    require_exportable(config, layers, heads)
    make = evict_model if config.caps is None else pooled_evict_model
    return make(config, layers, heads, head_dim)


class _Decoder(nn.Module):
    """A step as a pure function of the cache, for tracing with the gates apart: it gives what they read.

    ``read`` reads with ``model``; ``attention`` takes keys, values, the numbers that tell what is live, and T.
    """

    def __init__(self, model: GatedModel, read: Reader, attention: Callable[..., OnnxAttention | PooledAttention]):
        super().__init__()
        self.model, self.read, self.attention = model, read, attention

    def forward(self, chunk: list[Tensor], numbers: list[Tensor], cache: list[Tensor]) -> tuple[Tensor, ...]:
        logits, backend = self._step(chunk, numbers, cache)
        return (logits, *_caches(backend), *backend.retained)

    def _step(
        self, chunk: list[Tensor], numbers: list[Tensor], cache: list[Tensor]
    ) -> tuple[Tensor, OnnxAttention | PooledAttention]:
        backend = self.attention(cache[0::2], cache[1::2], numbers, chunk[0].shape[1])
        return self.read(chunk, backend).float(), backend


class _GatedDecoder(_Decoder):
    """The same with log-betas as state, which the step writes."""

    def forward(  # type: ignore[override]
        self, chunk: list[Tensor], numbers: list[Tensor], cache: list[Tensor], log_beta: Tensor
    ) -> tuple[Tensor, ...]:
        with deferred_sigmoid(self.model) as finish:
            logits, backend = self._step(chunk, numbers, cache)
        new = finish(torch.cat(backend.retained, dim=-1)[0])
        return (logits, *_caches(backend), write_log_betas(log_beta, numbers, new))


def _caches(backend: OnnxAttention | PooledAttention) -> list[Tensor]:
    return [tensor for pair in zip(backend.keys, backend.values, strict=True) for tensor in pair]


def _attention(
    model: GatedModel, config: CacheConfig, ops: str, scales: KVScales | None
) -> Callable[..., OnnxAttention | PooledAttention]:
    """See :class:`_Decoder`."""
    if config.caps is None:
        # Int8 keys and values are for this backend alone.
        make = partial(GroupQueryAttention, scales=scales) if scales else BACKENDS[ops]
        return lambda keys, values, numbers, count: make(keys, values, numbers[0], count)
    pooled, heads = POOLED_BACKENDS[ops], model.config.num_key_value_heads
    return lambda keys, values, numbers, count: pooled(keys, values, numbers[1], numbers[0], count, heads)


def _live(model: GatedModel, config: CacheConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Examples of the numbers that tell what is live, and of the table of log-betas."""
    number, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1)  # expanded: tracing needs shapes, not gigabytes
    rows = model.config.num_hidden_layers * model.config.num_key_value_heads
    if config.caps is None:
        return {"live_length": number}, zero.expand(config.slots, rows)
    return {"live_length": number, "lengths": number.expand(rows)}, zero.expand(rows, table_width(config))


def _cache_shapes(model: GatedModel, config: CacheConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of keys, and of values, by the names that come before ``.key``."""
    layers, heads = range(model.config.num_hidden_layers), model.config.num_key_value_heads
    if config.caps is None:
        return {f"{layer}": (1, heads, config.slots, model.head_dim) for layer in layers}
    return {
        f"{layer}.{head}": (1, 1, config.caps[layer][head] + config.buffer, model.head_dim)
        for layer in layers
        for head in range(heads)
    }


def _save_decoder(
    model: GatedModel,
    config: CacheConfig,
    ops: str,
    scales: KVScales | None,
    waiting: bool,
    path: Path,
    numbers: Numbers,
    say: Callable[[str], None],
) -> None:
    size = min(config.prefill_chunk, 3)
    read: Reader = RowsReader(model) if isinstance(model, GatedVisionModel) else TextReader(model)
    chunk = read.example(size)
    tokens = torch.export.Dim("T", min=1, max=config.prefill_chunk) if size > 1 else None
    live, table = _live(model, config)
    shapes = _cache_shapes(model, config)
    zero = torch.zeros(1, dtype=getattr(torch, config.kv_dtype))
    cache = [zero.expand(shape) for shape in shapes.values() for _ in ("key", "value")]
    names = [f"{prefix}.{kind}" for prefix in shapes for kind in ("key", "value")]
    dynamic: dict[str, Any] = {
        "chunk": [{axis: tokens} if tokens and axis is not None else None for axis in read.dynamic],
        "numbers": [None] * len(live),
        "cache": [None] * len(cache),
    }
    args: list[Any] = [list(chunk.values()), list(live.values()), cache]
    rows = [f"gate_input.{layer}" for layer in range(model.config.num_hidden_layers)]
    if not waiting:
        args.append(table)
        dynamic["log_beta"] = None
        names.append("log_beta")
        rows = []
    decoder = (_Decoder if waiting else _GatedDecoder)(model, read, _attention(model, config, ops, scales))
    rotary = fused_rotary(model) if ops == "gqa" else nullcontext()
    with rotary, gates_apart(model) if waiting else nullcontext():
        program = trace(
            decoder,
            tuple(args),
            [*chunk, *live, *(f"past.{name}" for name in names)],
            ["logits", *(f"present.{name}" for name in names), *rows],
            _OPSETS[ops],
            dynamic,
        )
    drop_round_trips(program.model.graph)
    if ops == "gqa":
        fuse_skip_norms(program.model)
        if config.prefill_chunk > LONGEST_DIRECT:
            branch_long_chunks(program.model.graph)
    fill(program.model.graph, decoder)
    say("onnx: weights")
    save_with_data(program.model, path, DECODER_DATA, numbers)


def _save_gates(model: GatedModel, config: CacheConfig, opset: int, path: Path, numbers: Numbers) -> None:
    gates = Gates(model)
    graph = trace_gates(gates, config, *_live(model, config), opset)
    fill(graph.graph, gates)
    save_with_data(graph, path, GATES_DATA, numbers)


def _require_safe(name: str, findings: list[str]) -> None:
    if findings:
        raise VerificationError(
            f"{name} cannot run in place: {'; '.join(findings)}: report this with the model's name and settings"
        )
