"""``evict.onnx``: the eviction event as two model-local functions in the domain ``trimkv`` with plain-operator bodies.

``trimkv::Evict(log_beta, positions, seen[, key_score]) -> (destination, source, log_beta', positions')`` selects and
keeps the books for all rows at once; another policy replaces only this function. Policies that look at keys get their
scores layer by layer from ``trimkv::KeyScores``. ``trimkv::MoveRows(cache, destination, source) ->
cache'`` moves at most B rows per head of one key or value tensor. Runtimes inline both; one that registers a kernel of
the same name runs that instead, and reads the settings from the node's attributes.

The body of ``Evict`` is traced from :mod:`trimkv_edge.eviction`, so there is one definition of who survives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import onnx
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import event_positions, find_policy, plan_moves, select_survivors
from trimkv_edge.export.onnx_trace import trace
from trimkv_edge.policies.base import Entries

DOMAIN = "trimkv"
OPSET = 18
IR_VERSION = 10
_SETTINGS = ("policy", "budget", "buffer", "sinks", "recent")


class _Evict(nn.Module):
    """Selection and bookkeeping of all rows (row = layer * kv_heads + head)."""

    def __init__(self, config: CacheConfig, layers: int, heads: int) -> None:
        super().__init__()
        self.config, self.layers, self.heads = config, layers, heads

    def forward(
        self, log_beta: Tensor, positions: Tensor, seen: Tensor, key_score: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        budget, buffer = self.config.budget, self.config.buffer
        where = event_positions(positions, seen, buffer)
        entries = Entries(log_beta.transpose(0, 1), where, seen, self.layers, self.heads, key_score)
        keep = select_survivors(entries, self.config)
        destination, source = plan_moves(keep, budget)
        by_slot = destination.transpose(0, 1)
        moved = log_beta.scatter(0, by_slot, log_beta.gather(0, source.transpose(0, 1)))
        # The table of positions ends at the budget, so a leftover (a ring slot moved onto itself) repeats the row's
        # first move instead; where nothing moves, the last kept slot is moved onto itself.
        inside = destination < budget
        first = inside[:, :1]
        to = torch.where(inside, destination, torch.where(first, destination[:, :1], budget - 1))
        origin = torch.where(inside, source, torch.where(first, source[:, :1], budget - 1))
        return destination, source, moved, positions.scatter(1, to, where.gather(1, origin))


class _KeyScores(nn.Module):
    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score

    def forward(self, cache: Tensor) -> Tensor:
        return self.score(cache[0])


def evict_function(config: CacheConfig, layers: int, heads: int) -> FunctionProto:
    """``trimkv::Evict`` for all (layer, KV head) pairs.

    Inputs: log_beta float32 ``[slots, rows]``, positions int64 ``[rows, budget]``, seen int64 ``[1]``, and for policies
    that score keys key_score float32 ``[rows, slots]``. Outputs: destination and source int64 ``[rows, buffer]``, then
    the first two inputs after the event.
    """
    rows = layers * heads
    log_beta = torch.zeros(config.slots, rows)
    positions = torch.arange(config.budget, dtype=torch.int64).expand(rows, -1).contiguous()
    inputs = ["log_beta", "positions", "seen"]
    outputs = ["destination", "source", "log_beta_out", "positions_out"]
    args = [log_beta, positions, torch.tensor([config.slots])]
    if find_policy(config.policy).key_score:
        inputs.append("key_score")
        args.append(torch.zeros(rows, config.slots))
    module = _Evict(config, layers, heads)
    return function_of("Evict", module, tuple(args), inputs, outputs, list(_SETTINGS))


def key_scores_function(
    score: Callable[[Tensor], Tensor], config: CacheConfig, heads: int, head_dim: int
) -> FunctionProto:
    """``trimkv::KeyScores``: one layer's keys ``[1, heads, slots, head_dim]`` -> ``[heads, slots]``."""
    cache = torch.ones(1, heads, config.slots, head_dim)
    return function_of("KeyScores", _KeyScores(score), (cache,), ["cache"], ["scores"], [])


def function_of(
    name: str, module: nn.Module, args: tuple[Tensor, ...], inputs: list[str], outputs: list[str], settings: list[str]
) -> FunctionProto:
    """A traced module as a model-local function."""
    # Folding without a limit would store a table of all slot numbers.
    model = trace(module, args, inputs, outputs, OPSET, fold_limit=16).model_proto
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    for node in nodes:
        node.ClearField("metadata_props")
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, opset, attributes=settings)


def move_rows_function(heads: int) -> FunctionProto:
    """``trimkv::MoveRows``: cache ``[1, heads, slots, head_dim]``, destination and source int64 ``[heads, B]``."""

    def constant(name: str, values: Sequence[int], scalar: bool = False) -> NodeProto:
        tensor = helper.make_tensor(name, TensorProto.INT64, [] if scalar else [len(values)], values)
        return helper.make_node("Constant", [], [name], value=tensor)

    node = helper.make_node
    nodes = [
        constant("zero", [0], scalar=True),
        constant("one", [1], scalar=True),
        constant("heads", [heads], scalar=True),
        constant("outer", [0, 3]),
        constant("around", [0, 2, 3]),
        node("Unsqueeze", ["source", "outer"], ["from_slot"]),
        node("GatherND", ["cache", "from_slot"], ["rows"], batch_dims=2),
        # Coordinates (0, head, slot) of each row that is written, [1, heads, B, 3].
        node("Unsqueeze", ["destination", "outer"], ["to_slot"]),
        node("Range", ["zero", "heads", "one"], ["each_head"]),
        node("Unsqueeze", ["each_head", "around"], ["head_column"]),
        node("Mul", ["to_slot", "zero"], ["batch_index"]),
        node("Add", ["batch_index", "head_column"], ["head_index"]),
        node("Concat", ["batch_index", "head_index", "to_slot"], ["to"], axis=-1),
        node("ScatterND", ["cache", "to", "rows"], ["cache_out"]),
    ]
    return helper.make_function(
        DOMAIN, "MoveRows", ["cache", "destination", "source"], ["cache_out"], nodes, [helper.make_opsetid("", OPSET)]
    )


def evict_model(config: CacheConfig, num_layers: int, num_kv_heads: int, head_dim: int) -> ModelProto:
    """The whole graph: inputs ``seen``, ``past.*``; outputs ``present.*`` (see :mod:`trimkv_edge.export.onnx`)."""
    rows = num_layers * num_kv_heads
    info = helper.make_tensor_value_info
    tables: list[tuple[str, int, list[int]]] = [
        ("log_beta", TensorProto.FLOAT, [config.slots, rows]),
        ("positions", TensorProto.INT64, [rows, config.budget]),
    ]
    caches = [f"{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    stored = TensorProto.DataType.Value(config.kv_dtype.upper().replace("FLOAT32", "FLOAT"))
    tensors = tables + [(name, stored, [1, num_kv_heads, config.slots, head_dim]) for name in caches]
    settings = {name: value for name, value in asdict(config).items() if name in _SETTINGS}
    functions = [evict_function(config, num_layers, num_kv_heads), move_rows_function(num_kv_heads)]
    nodes, given = [], ["past.log_beta", "past.positions", "seen"]
    score = find_policy(config.policy).key_score
    if score:
        functions.append(key_scores_function(score, config, num_kv_heads, head_dim))
        by_layer = [f"key_score.{layer}" for layer in range(num_layers)]
        for layer, name in enumerate(by_layer):
            nodes.append(helper.make_node("KeyScores", [f"past.{layer}.key"], [name], domain=DOMAIN))
        nodes.append(helper.make_node("Concat", by_layer, ["key_score"], axis=0))
        given.append("key_score")
    nodes.append(
        helper.make_node(
            "Evict",
            given,
            ["destination", "source", "present.log_beta", "present.positions"],
            domain=DOMAIN,
            **settings,
        )
    )
    for table in ("destination", "source"):
        parts = [f"{table}.{layer}" for layer in range(num_layers)]
        nodes.append(helper.make_node("Split", [table], parts, axis=0, num_outputs=num_layers))
    for name in caches:
        number = name.split(".")[0]
        names = [f"past.{name}", f"destination.{number}", f"source.{number}"]
        nodes.append(helper.make_node("MoveRows", names, [f"present.{name}"], domain=DOMAIN))

    def values(prefix: str) -> list[ValueInfoProto]:
        return [info(f"{prefix}.{name}", kind, shape) for name, kind, shape in tensors]

    graph = helper.make_graph(
        nodes, "evict", [info("seen", TensorProto.INT64, [1]), *values("past")], values("present")
    )
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="trimkv-edge",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
