"""Integer graphs for Arm's NPUs: PT2E quantisation, calibrated on a stream that evicts.

Keys of a layer have one scale, in and out and in all graphs, and so have values: a row that a graph gave is the same
integers when it comes back, so the cache is rounded once, not in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.arm_recipes import rounding
from trimkv_edge.export.backends.lowering import quiet, traced, zeros
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.targets import Job
from trimkv_edge.export.tokenizer import sample_tokens
from trimkv_edge.host_cache import HostCache, Rotary, padded

# What the mask adds to hidden slots where it has 8 bits: -10,000 would make its step 39.
MASKED_IN_BITS = -30.0


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
        for name, count in counts.items():
            calibrate(prepared[name], module, config, count, tokens)
        return {
            name: torch.export.export(convert_pt2e(graph), zeros(module, config, counts[name]), strict=False)
            for name, graph in prepared.items()
        }


def tokens_for(job: Job) -> list[int]:
    """A stream of sample text, or of any tokens without a tokenizer, with three events of a full cache."""
    count = job.config.slots + 3 * job.config.buffer
    # From far from where verification reads.
    return sample_tokens(job.folder, job.tokenizer, job.model.config.vocab_size, 16 * count)[-count:]


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


def calibrate(
    prepared: GraphModule, module: HostEvicted, config: CacheConfig, count: int, tokens: Sequence[int]
) -> None:
    """Reads ``tokens`` as a host does; observers note every range, and do not change the numbers."""
    shape, outputs = module.model.config, module.names()[1]
    layers = range(shape.num_hidden_layers)
    cache = HostCache(config, len(layers), shape.num_key_value_heads, module.model.head_dim, masked=MASKED_IN_BITS)
    rotary = module.model.base.model.rotary_emb
    turn = Rotary(rotary.inv_freq.float().numpy(), float(rotary.attention_scaling))
    table = module.model.base.model.embed_tokens.weight
    ids, start = torch.tensor(tokens), 0
    while start < len(tokens):
        taken = min(count, cache.room, len(tokens) - start)
        which = padded(taken, count)
        cos, sin = (torch.from_numpy(rows) for rows in turn.rows(start + which))
        past: list[Tensor] = [
            torch.from_numpy(rows[layer : layer + 1]) for layer in layers for rows in (cache.key, cache.value)
        ]
        with torch.no_grad():
            found = prepared(
                table[ids[start + torch.from_numpy(which)]][None],
                cos,
                sin,
                torch.from_numpy(cache.mask(taken, count)),
                past,
            )
        named = dict(zip(outputs, (out.numpy() for out in found), strict=True))
        key, value = (np.concatenate([named[f"new.{layer}.{kind}"] for layer in layers]) for kind in ("key", "value"))
        gates = np.concatenate([named[f"gate.{layer}"] for layer in layers]) if module.gated else None
        cache.append(key, value, gates, taken)
        start += taken
        if cache.room == 0:
            cache.evict()
