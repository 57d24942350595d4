"""Ranges for graphs in integers: a host in torch reads a stream that evicts, while observers look on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.targets import Job
from trimkv_edge.export.tokenizer import sample_tokens
from trimkv_edge.host_cache import MASKED, HostCache, Rotary, padded

# What the mask adds to hidden slots where it is rounded: -10,000 would make its step 39 in 8 bits, and behind softmax
# this is as good.
MASKED_IN_BITS = -30.0
# At each end of the stream, for graphs that take few tokens: the empty cache, and one that evicts.
SOME = 256


class TorchHost:
    """A host around host-evicted graphs that run in torch.

    Args:
        module: what the graphs were made from, with the embedding in memory.
        graphs: by number of tokens.
        masked: see :class:`~trimkv_edge.host_cache.HostCache`.
    """

    def __init__(
        self, module: HostEvicted, graphs: Mapping[int, Callable[..., Any]], config: CacheConfig, masked: float = MASKED
    ) -> None:
        rotary = module.model.base.model.rotary_emb
        self.config = config
        self._module, self._graphs, self._masked = module, graphs, masked
        self._rotary = Rotary(rotary.inv_freq.float().numpy(), float(rotary.attention_scaling))
        self._layers = range(module.model.config.num_hidden_layers)
        self._outputs = module.names()[1]
        self.reset()

    def reset(self) -> None:
        """Empties the cache."""
        model = self._module.model
        shape = (len(self._layers), model.config.num_key_value_heads, model.head_dim)
        self._cache = HostCache(self.config, *shape, masked=self._masked)

    @property
    def room(self) -> int:
        """Tokens that fit before the next event."""
        return self._cache.room

    def prefill(self, ids: Sequence[int]) -> FloatArray:
        """Reads tokens, one of them with the graph for the fewest; returns the logits after the last."""
        cache, taken = self._cache, len(ids)
        count = min(self._graphs) if taken == 1 else max(self._graphs)
        rows = padded(taken, count)
        cos, sin = (torch.from_numpy(table) for table in self._rotary.rows(cache.seen + rows))
        past = [torch.from_numpy(table[at : at + 1]) for at in self._layers for table in (cache.key, cache.value)]
        hidden = self._module.model.base.model.embed_tokens.weight[torch.tensor(ids)[rows]][None]
        with torch.no_grad():
            found = self._graphs[count](hidden, cos, sin, torch.from_numpy(cache.mask(taken, count)), past)
        named = dict(zip(self._outputs, (out.numpy() for out in found), strict=True))
        key, value = (np.concatenate([named[f"new.{at}.{kind}"] for at in self._layers]) for kind in ("key", "value"))
        gates = np.concatenate([named[f"gate.{at}"] for at in self._layers]) if self._module.gated else None
        cache.append(key, value, gates, taken)
        logits: FloatArray = named["logits"][0, 0].copy()
        return logits

    def evict(self) -> None:
        """Runs the event."""
        self._cache.evict()

    def survivors(self) -> IntArray:
        """Positions of the live entries, ``[layers, kv_heads, live]``, in slot order."""
        return self._cache.positions[:, :, : self._cache.live].copy()


def calibrate(
    graphs: Mapping[int, Callable[..., Any]], module: HostEvicted, config: CacheConfig, tokens: Sequence[int]
) -> None:
    """Reads ``tokens`` once with each graph; its observers note every range and change no number.

    Args:
        graphs: by number of tokens. Of a long stream, all but the one for the most read only the first and the last
            ``SOME`` tokens themselves; what lies between fills the cache faster.
    """
    most, end = max(graphs), len(tokens)
    for count in graphs:
        host, start = TorchHost(module, {one: graphs[one] for one in (count, most)}, config, MASKED_IN_BITS), 0
        while start < end:
            between = end - SOME - start if count < most and start >= SOME else 0
            taken = min(most, between) if between > 0 else min(count, end - start)
            taken = min(taken, host.room)
            host.prefill(tokens[start : start + taken])
            start += taken
            if host.room == 0:
                host.evict()


def look_once_at_weights(prepared: GraphModule) -> None:
    """Lets observers that see nothing but weights, which no token changes, see them now and never again."""
    seen: dict[nn.Module, list[Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            seen.setdefault(attrgetter(str(node.target))(prepared), []).append(node.args[0])
    for observer, sources in seen.items():
        if all(source.op == "get_attr" for source in sources):
            for source in sources:
                observer(attrgetter(str(source.target))(prepared))
            observer.forward = _unseen


def _unseen(weight: Tensor) -> Tensor:
    return weight


def tokens_for(job: Job) -> list[int]:
    """A stream of sample text, or of any tokens without a tokenizer, with three events of a full cache."""
    count = job.config.slots + 3 * job.config.buffer
    # From far from where verification reads.
    return sample_tokens(job.folder, job.tokenizer, job.model.config.vocab_size, 16 * count)[-count:]
