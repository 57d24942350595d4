"""The host-evicted form of a model: static graphs for NPUs, whose cache a host drives (docs/npu.md).

One graph per number of tokens: ``decode`` (1) and ``prefill`` (the prefill chunk). All tensors are float32, all shapes
static; T is the graph's tokens, C = M + B the slots:

=============== ================================ ==========================================================
``hidden``      ``[1, T, hidden_size]``          rows of the embedding
``cos, sin``    ``[1, T, rotated]``              of the tokens' positions
``mask``        ``[1, 1, T, C + T]``             added to the attention logits; columns: slots, then the chunk
``past.{i}.X``  ``[1, kv_heads, C, head_dim]``   layer i, X = ``key`` (after RoPE) and ``value``; read only
``logits``      ``[1, 1, vocabulary]``           output: of the last row
``new.{i}.X``   ``[1, kv_heads, T, head_dim]``   output: the chunk's rows
``gate.{i}``    ``[1, T, kv_heads]``             output: raw gate logits; none where a model has no gates
=============== ================================ ==========================================================

Positions, slots and the eviction event never enter a graph: float16 holds positions up to 2,048 only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.host_lint import lint_host
from trimkv_edge.export.onnx_data import save_with_data
from trimkv_edge.export.onnx_gates import deferred_sigmoid
from trimkv_edge.export.onnx_reshapes import drop_round_trips
from trimkv_edge.export.onnx_rewrite import clean, divide_by_roots
from trimkv_edge.export.onnx_trace import trace
from trimkv_edge.export.onnx_weights import fill, prepare
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.resume import Numbers
from trimkv_edge.host_cache import MASKED
from trimkv_edge.host_eviction import require_host
from trimkv_edge.manifest import Target
from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, model_weights
from trimkv_edge.retention import RetentionGate

TARGET = "host-evicted"
GRAPHS = {"decode": "host_decode.onnx", "prefill": "host_prefill.onnx"}
DATA, CONSTANTS = "host_weights.bin", "host.json"
# The lowest that torch's exporter writes natively: what NPU toolchains know best.
_OPSET = 18


class HostAttention:
    """Attention over slots that are only read and over the chunk's own rows, under one mask for all heads.

    The two parts meet as attention logits, so the cache is never copied. The query heads of a KV head are rows of one
    matrix product, which keeps every tensor at four axes.
    """

    def __init__(self, past: list[Tensor], mask: Tensor) -> None:
        self.past, self.mask = past, mask
        self.rows: list[Tensor] = []
        self.gates: list[Tensor] = []

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Takes a layer's gate logits ``[1, T, kv_heads]``; layers come in order."""
        self.gates.append(log_beta)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`~trimkv_edge.models.attention.AttentionBackend`."""
        _, heads, count, width = query.shape
        past_key, past_value = self.past[2 * layer : 2 * layer + 2]
        kv_heads, slots = past_key.shape[1:3]
        group = heads // kv_heads
        if self.mask.shape[2] != group * count:
            self.mask = torch.cat([self.mask] * group, dim=2)
        self.rows += [key, value]
        rows = (query * scale).reshape(1, kv_heads, group * count, width)
        logits = torch.cat([rows @ past_key.transpose(2, 3), rows @ key.transpose(2, 3)], dim=-1)
        weights = torch.softmax(logits + self.mask, dim=-1)
        out = weights[..., :slots] @ past_value + weights[..., slots:] @ value
        return out.reshape(1, heads, count, width).transpose(1, 2)


class HostEvicted(nn.Module):
    """The part of a gated model between its embedding and its logits, with every input a plain tensor.

    Args:
        model: float32; trace it under :func:`~trimkv_edge.export.onnx_gates.deferred_sigmoid`.
    """

    def __init__(self, model: GatedModel) -> None:
        super().__init__()
        self.model = model
        self.gated = isinstance(model.gates[0], RetentionGate)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Tensors as in the table above; ``past`` is key and value of each layer in turn."""
        base = self.model.base
        backend = HostAttention(past, mask)
        for layer in base.model.layers:
            hidden = layer(hidden, position_embeddings=(cos, sin), **{BACKEND_KEYWORD: backend})
        logits = base.lm_head(base.model.norm(hidden[:, -1:]))
        return (logits, *backend.rows, *(backend.gates if self.gated else ()))

    def inputs(self, config: CacheConfig, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """Arguments of :meth:`forward` for ``count`` tokens, in their shapes but without memory."""
        shape, zero = self.model.config, torch.zeros(1)
        angles = (1, count, 2 * self.model.base.model.rotary_emb.inv_freq.numel())
        slots = (1, shape.num_key_value_heads, config.slots, self.model.head_dim)
        return (
            zero.expand(1, count, shape.hidden_size),
            zero.expand(angles),
            zero.expand(angles),
            zero.expand(1, 1, count, config.slots + count),
            [zero.expand(slots) for _ in range(2 * shape.num_hidden_layers)],
        )

    def names(self) -> tuple[list[str], list[str]]:
        """Names of inputs and outputs, in order."""
        layers = range(self.model.config.num_hidden_layers)
        tables = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        gates = [f"gate.{layer}" for layer in layers] if self.gated else []
        return (
            ["hidden", "cos", "sin", "mask", *(f"past.{name}" for name in tables)],
            ["logits", *(f"new.{name}" for name in tables), *gates],
        )


def host_program(model: GatedModel, config: CacheConfig, count: int) -> ExportedProgram:
    """The same module through ``torch.export``, for toolchains that start there.

    Args:
        model: with its weights in memory.
        count: tokens of the graph.

    Raises:
        ConfigError: settings that a host does not run.
    """
    require_host(config)
    module = HostEvicted(model)
    with torch.no_grad(), deferred_sigmoid(model):
        return torch.export.export(module, module.inputs(config, count), strict=False)


def export_host_evicted(
    model: GatedModel,
    config: CacheConfig,
    folder: Path,
    *,
    scheme: Scheme = SCHEMES["none"],
    weights: Weights | None = None,
    masked: float = MASKED,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    progress: Callable[[str], None] | None = None,
) -> Target:
    """Writes the graphs, their common weights, the embedding's rows and ``host.json``; each through a temporary name.

    Args:
        model: float32, on the CPU; hollow if ``weights`` are given.
        config: cache settings.
        folder: the artefact; made if missing.
        scheme: ``none``.
        weights: where values come from, one at a time; default: the model itself.
        masked: see :class:`~trimkv_edge.host_cache.HostCache`.
        numbers: how packing the weights is reported and gone on with.
        progress: called with one line per stage.

    Raises:
        ConfigError: a setting that a host does not run, or another scheme.
        VerificationError: a graph holds what NPU toolchains refuse.
    """
    if scheme.weight_bits < 32:
        raise ConfigError(f"--target {TARGET} stores float32 weights only: use --quant none")
    if config.kv_dtype != "float32":
        raise ConfigError(f"--target {TARGET} keeps float32 keys and values only: leave out --kv-dtype")
    require_host(config)
    say = progress or (lambda _: None)
    source = weights or model_weights(model)
    graphs = chunks(config)
    files = {"weights": DATA, **{name: GRAPHS[name] for name in graphs}}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".host-", dir=folder) as temporary:
        work = Path(temporary)  # graphs name their weights relative to themselves
        module = HostEvicted(prepare(model.eval(), source, scheme))
        stored: dict[str, ir.TensorProtocol] = {}
        for name, count in graphs.items():
            say(f"{TARGET}: graph for {tokens(count)}")
            _save_graph(module, config, count, work / GRAPHS[name], stored, numbers)
        say(f"{TARGET}: embedding")
        files |= save_host(model, source, work, CONSTANTS, masked)
        for name in files.values():
            os.replace(work / name, folder / name)
    return Target(TARGET, "rows", files)


def _save_graph(
    module: HostEvicted,
    config: CacheConfig,
    count: int,
    path: Path,
    stored: dict[str, ir.TensorProtocol],
    numbers: Numbers,
) -> None:
    """Writes one graph; the first also writes the weights and notes in ``stored`` where they are."""
    inputs, outputs = module.names()
    with deferred_sigmoid(module.model):
        program = trace(module, module.inputs(config, count), inputs, outputs, _OPSET)
    graph = program.model.graph
    drop_round_trips(graph)
    fill(graph, module)
    if not stored:
        save_with_data(program.model, path, DATA, numbers)
        parameters = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        for name, value in graph.initializers.items():
            if name in parameters and isinstance(value.const_value, ir.ExternalTensor):
                stored[name] = value.const_value
    else:
        for name, value in graph.initializers.items():
            value.const_value = stored.get(name, value.const_value)
        ir.save(program.model, path)
    made = onnx.load(path, load_external_data=False)
    clean(made)
    divide_by_roots(made)
    onnx.save(made, path)
    onnx.checker.check_model(path)
    if findings := lint_host(made):
        raise VerificationError(
            f"{path.name} is not fit for NPUs: {'; '.join(findings[:5])}: report this with the model's name and "
            "settings"
        )
