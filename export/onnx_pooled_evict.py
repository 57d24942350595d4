"""``evict.onnx`` where heads share a budget: selection over all rows, then moves of any number per head.

``trimkv::EvictPooled(log_beta, positions, lengths, seen, fill) -> (holes, movers, log_beta', positions', lengths')``
selects and keeps the books; ``trimkv::MovePlan(holes, movers, base) -> (to, from)`` lists a layer's moves, and
``trimkv::MoveRows(cache, to, from) -> cache'`` makes them in one key or value tensor. All bodies are plain operators.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate

import onnx
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx_evict import DOMAIN, IR_VERSION, OPSET, function_of
from trimkv_edge.export.onnx_pooled import table_width
from trimkv_edge.pooled_eviction import origins
from trimkv_edge.row_blocks import pooled_event, put_back

_SETTINGS = ("policy", "budget", "buffer", "sinks", "recent", "min_per_head", "threshold")


class _Evict(nn.Module):
    """Selection and bookkeeping of all rows."""

    def __init__(self, config: CacheConfig, layers: int, heads: int) -> None:
        super().__init__()
        self.config, self.layers, self.heads = config, layers, heads

    def forward(
        self, log_beta: Tensor, kept: Tensor, lengths: Tensor, seen: Tensor, fill: Tensor
    ) -> tuple[Tensor, ...]:
        rows, slots = log_beta.shape
        most = kept.shape[1]
        blocks = pooled_event(log_beta, kept, lengths.unsqueeze(1), seen, fill, self.layers, self.config)
        origin = [origins(block.holes, block.movers) for block in blocks]
        holes, movers, moved, places = (
            put_back(parts, blocks, columns)
            for parts, columns in (
                ([block.holes for block in blocks], slots),
                ([block.movers for block in blocks], slots),
                ([block.log_beta.gather(1, o) for block, o in zip(blocks, origin, strict=True)], slots),
                ([block.positions.gather(1, o) for block, o in zip(blocks, origin, strict=True)], most),
            )
        )
        after = put_back([block.lengths for block in blocks], blocks, 1).squeeze(1)
        # Written through scatters over every slot, so that runtimes may write in place.
        slot = torch.arange(slots, dtype=torch.int64).expand(rows, -1)
        return (
            holes,
            movers,
            log_beta.scatter(1, slot, moved),
            kept.scatter(1, slot[:, :most], places),
            lengths.scatter(0, torch.arange(rows), after),
        )


def _move_plan_function() -> FunctionProto:
    """Holes and movers of a layer, bool ``[heads, W]``, and each head's first row, int64 ``[heads]`` -> rows to write
    int64 ``[moves, 1]`` and rows to read ``[moves]``; both lists are by head, then by slot."""
    node = helper.make_node
    nodes = [
        node("Constant", [], ["last"], value=helper.make_tensor("last", TensorProto.INT64, [1], [-1])),
        node("Constant", [], ["first"], value=helper.make_tensor("first", TensorProto.INT64, [1], [0])),
    ]
    for mask, out in (("holes", "to_row"), ("movers", "from_row")):
        nodes += [
            node("NonZero", [mask], [f"{mask}_at"]),
            node("Split", [f"{mask}_at"], [f"{mask}_head", f"{mask}_slot"], axis=0, num_outputs=2),
            node("Gather", ["base", f"{mask}_head"], [f"{mask}_base"]),
            node("Add", [f"{mask}_base", f"{mask}_slot"], [f"{mask}_rows"]),
            node("Squeeze", [f"{mask}_rows", "first"], [out]),
        ]
    nodes += [node("Unsqueeze", ["to_row", "last"], ["to"]), node("Identity", ["from_row"], ["from"])]
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, "MovePlan", ["holes", "movers", "base"], ["to", "from"], nodes, opset)


def _move_rows_function() -> FunctionProto:
    node = helper.make_node
    nodes = [node("Gather", ["cache", "from"], ["rows"]), node("ScatterND", ["cache", "to", "rows"], ["cache_out"])]
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, "MoveRows", ["cache", "to", "from"], ["cache_out"], nodes, opset)


def pooled_evict_model(config: CacheConfig, num_layers: int, num_kv_heads: int, head_dim: int) -> ModelProto:
    """The whole graph: inputs ``seen``, ``live_length``, ``past.*``; outputs ``present.*``."""
    assert config.caps is not None
    rows, width = num_layers * num_kv_heads, table_width(config)
    tables: list[tuple[str, int, list[int]]] = [
        ("log_beta", TensorProto.FLOAT, [rows, width]),
        ("positions", TensorProto.INT64, [rows, width - config.buffer]),
        ("lengths", TensorProto.INT64, [rows]),
    ]
    names = [name for name, _, _ in tables]
    one = torch.ones(1, dtype=torch.int64)
    evict = function_of(
        "EvictPooled",
        _Evict(config, num_layers, num_kv_heads),
        (
            torch.zeros(rows, width),
            torch.zeros(rows, width - config.buffer, dtype=torch.int64),
            torch.zeros(rows, dtype=torch.int64),
            one,
            one.clone(),
        ),
        [*names, "seen", "live_length"],
        ["holes", "movers", *(f"{name}_out" for name in names)],
        list(_SETTINGS),
    )
    settings = {name: value for name, value in asdict(config).items() if name in _SETTINGS}
    nodes: list[NodeProto] = [
        helper.make_node(
            "EvictPooled",
            [*(f"past.{name}" for name in names), "seen", "live_length"],
            ["holes", "movers", *(f"present.{name}" for name in names)],
            domain=DOMAIN,
            **settings,
        )
    ]
    for mask in ("holes", "movers"):
        parts = [f"{mask}.{layer}" for layer in range(num_layers)]
        nodes.append(helper.make_node("Split", [mask], parts, axis=0, num_outputs=num_layers))
    bases, tensors = [], list(tables)
    for layer, caps in enumerate(config.caps):
        slots = [cap + config.buffer for cap in caps]
        starts = [0, *accumulate(slots)][:-1]
        bases.append(helper.make_tensor(f"base.{layer}", TensorProto.INT64, [len(starts)], starts))
        nodes.append(
            helper.make_node(
                "MovePlan",
                [f"holes.{layer}", f"movers.{layer}", f"base.{layer}"],
                [f"to.{layer}", f"from.{layer}"],
                domain=DOMAIN,
            )
        )
        for kind in ("key", "value"):
            name = f"{layer}.{kind}"
            tensors.append((name, TensorProto.FLOAT, [sum(slots), head_dim]))
            inputs = [f"past.{name}", f"to.{layer}", f"from.{layer}"]
            nodes.append(helper.make_node("MoveRows", inputs, [f"present.{name}"], domain=DOMAIN))
    info = helper.make_tensor_value_info
    past, present = ([info(f"{side}.{n}", kind, shape) for n, kind, shape in tensors] for side in ("past", "present"))
    plain = [info(name, TensorProto.INT64, [1]) for name in ("seen", "live_length")]
    graph = helper.make_graph(nodes, "evict", [*plain, *past], present, initializer=bases)
    model = helper.make_model(
        graph,
        functions=[evict, _move_plan_function(), _move_rows_function()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="trimkv-edge",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
