"""``8a8w`` for CoreML: linear layers whose inputs and weights have 8 bits, calibrated on a stream that evicts.

ExecuTorch's ``CoreMLQuantizer`` rounds the residual stream, norms, the mask, logits and what the cache takes as well,
and cannot be told not to; so layers are chosen here, and get what it gives them. Gates stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.calibration import calibrate, look_once_at_weights
from trimkv_edge.export.backends.coreml_package import GATE
from trimkv_edge.export.backends.lowering import quiet, traced, zeros
from trimkv_edge.export.host_evicted import HostEvicted


def quantized(
    module: HostEvicted, config: CacheConfig, counts: dict[str, int], tokens: Sequence[int]
) -> dict[str, ExportedProgram]:
    """Graphs whose linear layers have a scale for their input, the same in all graphs, and one for each output channel.

    Args:
        counts: tokens of each graph by its name; the one that takes most reads the stream.
        tokens: the stream; longer than a full cache, so that it evicts.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with quiet():
        prepared = {
            name: prepare_pt2e(traced(module, config, count).module(check_guards=False), _linears())
            for name, count in counts.items()
        }
        reader = max(counts, key=lambda name: counts[name])
        for graph in prepared.values():
            _share(graph, prepared[reader])
        for graph in prepared.values():
            look_once_at_weights(graph)
        calibrate({counts[reader]: prepared[reader]}, module, config, tokens)
        return {
            name: torch.export.export(convert_pt2e(graph), zeros(module, config, counts[name]), strict=False)
            for name, graph in prepared.items()
        }


def _linears() -> Any:
    """A quantizer of linear layers that are not of a gate; what they give is not rounded."""
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    common = dict(dtype=torch.int8, quant_min=-127, quant_max=127)
    inputs = QuantizationSpec(observer_or_fake_quant_ctr=MinMaxObserver, qscheme=torch.per_tensor_symmetric, **common)
    weights = QuantizationSpec(
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0, **common
    )

    class Linears(Quantizer):  # type: ignore[misc]
        def annotate(self, model: GraphModule) -> GraphModule:
            for node, data, weight in _layers(model):
                if GATE not in str(weight.target):
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={data: inputs, weight: weights}, _annotated=True
                    )
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    return Linears()


def _layers(graph: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """(layer, input, weight) of each linear layer."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            yield node, node.args[0], node.args[1]


def _share(graph: GraphModule, reader: GraphModule) -> None:
    """Gives a graph the observers of the one that reads the stream."""
    for (_, data, weight), (_, seen, held) in zip(_layers(graph), _layers(reader), strict=True):
        for own, other in ((data, seen), (weight, held)):
            if own.op == "call_module":
                setattr(graph, str(own.target), getattr(reader, str(other.target)))
    graph.recompile()
