"""``evict.onnx``: the eviction event as two model-local functions in the domain ``trimkv`` with plain-operator bodies.

``trimkv::Evict(log_beta, positions, seen) -> (destination, source, log_beta', positions')`` selects and keeps the books
for all rows at once; another policy replaces only this function. ``trimkv::MoveRows(cache, destination, source) ->
cache'`` moves at most B rows per head of one key or value tensor. Runtimes inline both; one that registers a kernel of
the same name runs that instead, and reads the settings from the node's attributes.

The body of ``Evict`` is traced from :mod:`trimkv_edge.eviction`, so there is one definition of who survives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import onnx
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import event_positions, plan_moves, select_survivors
from trimkv_edge.export.onnx_trace import trace

DOMAIN = "trimkv"
OPSET = 18
IR_VERSION = 10
_SETTINGS = ("budget", "buffer", "sinks", "recent")


class _Evict(nn.Module):
    """Selection and bookkeeping of all rows (row = layer * kv_heads + head)."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, log_beta: Tensor, positions: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        budget, buffer = self.config.budget, self.config.buffer
        where = event_positions(positions, seen, buffer)
        keep = select_survivors(log_beta.transpose(0, 1), where, seen, self.config)
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


def evict_function(config: CacheConfig, rows: int) -> FunctionProto:
    """``trimkv::Evict`` for ``rows`` (layer, KV head) pairs.

    Inputs: log_beta float32 ``[slots, rows]``, positions int64 ``[rows, budget]``, seen int64 ``[1]``. Outputs:
    destination and source int64 ``[rows, buffer]``, then the first two inputs after the event.

    Raises:
        ConfigError: look-ahead scores, which are not exported.
    """
    if config.lookahead != 1:
        raise ConfigError(
            f"lookahead is {config.lookahead}, but the onnx target exports the single-step score only: use lookahead 1"
        )
    log_beta = torch.zeros(config.slots, rows)
    positions = torch.arange(config.budget, dtype=torch.int64).expand(rows, -1).contiguous()
    inputs = ["log_beta", "positions", "seen"]
    outputs = ["destination", "source", "log_beta_out", "positions_out"]
    args = (log_beta, positions, torch.tensor([config.slots]))
    # Folding without a limit would store a table of all slot numbers.
    model = trace(_Evict(config), args, inputs, outputs, OPSET, fold_limit=16).model_proto
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    for node in nodes:
        node.ClearField("metadata_props")
    return helper.make_function(
        DOMAIN, "Evict", inputs, outputs, nodes, [helper.make_opsetid("", OPSET)], attributes=list(_SETTINGS)
    )


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
    tensors = tables + [(name, TensorProto.FLOAT, [1, num_kv_heads, config.slots, head_dim]) for name in caches]
    settings = {name: value for name, value in asdict(config).items() if name in _SETTINGS}
    nodes = [
        helper.make_node(
            "Evict",
            ["past.log_beta", "past.positions", "seen"],
            ["destination", "source", "present.log_beta", "present.positions"],
            domain=DOMAIN,
            **settings,
        ),
    ]
    for table in ("destination", "source"):
        parts = [f"{table}.{layer}" for layer in range(num_layers)]
        nodes.append(helper.make_node("Split", [table], parts, axis=0, num_outputs=num_layers))
    for name in caches:
        layer = name.split(".")[0]
        names = [f"past.{name}", f"destination.{layer}", f"source.{layer}"]
        nodes.append(helper.make_node("MoveRows", names, [f"present.{name}"], domain=DOMAIN))

    def values(prefix: str) -> list[ValueInfoProto]:
        return [info(f"{prefix}.{name}", kind, shape) for name, kind, shape in tensors]

    graph = helper.make_graph(
        nodes, "evict", [info("seen", TensorProto.INT64, [1]), *values("past")], values("present")
    )
    model = helper.make_model(
        graph,
        functions=[evict_function(config, rows), move_rows_function(num_kv_heads)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="trimkv-edge",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
