"""Integer graphs for Arm's NPUs: PT2E quantisation, calibrated on a stream that evicts.

Keys of a layer have one scale, in and out and in all graphs, and so have values: a row that a graph gave is the same
integers when it comes back, so the cache is rounded once, not in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.arm_recipes import rounding
from trimkv_edge.export.backends.calibration import calibrate, look_once_at_weights
from trimkv_edge.export.backends.lowering import quiet, traced, zeros
from trimkv_edge.export.host_evicted import HostEvicted


def quantized(
    module: HostEvicted,
    config: CacheConfig,
    counts: dict[str, int],
    precision: str,
    quantizer: Callable[[], Any],
    tokens: Sequence[int],
) -> dict[str, ExportedProgram]:
    """Graphs whose weights and activations are rounded.

    Args:
        counts: tokens of each graph by its name.
        precision: see :mod:`~trimkv_edge.export.backends.arm_recipes`.
        quantizer: makes one of the device.
        tokens: the stream that ranges are taken from; longer than a full cache, so that it evicts.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    recipe = rounding(precision, module.names()[1])
    prepared: dict[str, GraphModule] = {}
    cached: dict[str, nn.Module] = {}
    with quiet():
        for name, count in counts.items():
            annotator = quantizer()
            annotator.set_global(recipe)
            # Guards are a submodule that Arm's passes do not know.
            prepared[name] = prepare_pt2e(traced(module, config, count).module(check_guards=False), annotator)
            _share_scales(prepared[name], module, cached)
        for graph in prepared.values():
            look_once_at_weights(graph)
        calibrate({count: prepared[name] for name, count in counts.items()}, module, config, tokens)
        return {
            name: torch.export.export(convert_pt2e(graph), zeros(module, config, counts[name]), strict=False)
            for name, graph in prepared.items()
        }


def _share_scales(prepared: GraphModule, module: HostEvicted, cached: dict[str, nn.Module]) -> None:
    """Lets one observer see what enters and leaves the cache, for keys and values of each layer, in all graphs.

    Args:
        cached: observers by input; filled by the first graph.
    """
    inputs, outputs = module.names()
    nodes = list(prepared.graph.nodes)
    entering = [node for node in nodes if node.op == "placeholder"]
    (last,) = (node for node in nodes if node.op == "output")
    for name, node in zip(inputs, entering, strict=True):
        if not name.startswith("past."):
            continue
        leaving = last.args[0][outputs.index(name.replace("past.", "new."))]
        (seen,) = (user for user in node.users if user.op == "call_module")
        if leaving.op != "call_module":
            raise VerificationError(f"output {name.replace('past.', 'new.')} is not rounded: report this")
        shared = cached.setdefault(name, getattr(prepared, seen.target))
        for one in {id(getattr(prepared, node.target)) for node in (seen, leaving)}:
            # All that has this observer: what only arranges a tensor has the scale of what it reads.
            for place in [place for place, part in prepared.named_children() if id(part) == one]:
                setattr(prepared, place, shared)
    prepared.recompile()
