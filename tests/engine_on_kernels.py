"""The torch engine with its Triton kernels against the eager engine: ``python engine_on_kernels.py interpreter|cuda``.

Run by itself, since Triton decides when it is imported whether kernels are interpreted. In the interpreter the kernels
take the place of the CPU's operators; on CUDA everything is compiled and replayed as users run it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from factories import gated_model, random_tokens

import trimkv_edge.gpu.ops  # noqa: F401  defines the operators that are replaced
from trimkv_edge.config import CacheConfig
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.engine import CompiledEngine
from trimkv_edge.gpu.kernels.attend import attend, attend_pool
from trimkv_edge.gpu.kernels.evict import evict
from trimkv_edge.gpu.placement import moved
from trimkv_edge.gpu.pooled_engine import CompiledPooledEngine
from trimkv_edge.models.eager import eager_engine

HEADS = CacheConfig(budget=17, buffer=6, prefill_chunk=5, sinks=1, recent=2)
SHARED = CacheConfig(budget=17, buffer=6, prefill_chunk=5, policy="global")


def course(engine: Any, reference: Any, events: int) -> None:
    """Chunks of every size, then tokens."""
    sizes, done = [5, 1, 3, 4, 2], 0
    while done < events:
        size = min(sizes[reference.seen % 5] if done < events // 2 else 1, reference.room)
        ids = random_tokens(size, seed=reference.seen)
        want, got = reference.prefill(ids), engine.prefill(ids)
        np.testing.assert_allclose(got, want, atol=2e-4)
        assert got.argmax() == want.argmax()
        if reference.room == 0:
            reference.evict()
            engine.evict()
            done += 1
        np.testing.assert_array_equal(engine.survivors(), reference.survivors())


def batch(config: CacheConfig, gates: str, device: str, compiled: bool) -> None:
    """Streams of different lengths, each as it is alone."""
    model = gated_model("qwen3-gqa", gates)
    together = Batch(moved(model, device), config, 3, compiled=compiled)
    prompts = {row: random_tokens(length, seed=row) for row, length in enumerate((4, 37, 23))}
    together.read(prompts)
    drawn = together.decode(9).tokens()
    for row, prompt in prompts.items():
        alone, logits, said = eager_engine(model, config), np.zeros(1), []
        for step in range(len(prompt) + 9):
            if alone.room == 0:
                alone.evict()
            token = prompt[step] if step < len(prompt) else int(logits.argmax())
            said.append(token)
            logits = alone.decode(token)
        assert said[len(prompt) :] == drawn[row].tolist(), row


def main(place: str) -> None:
    on_cuda = place == "cuda"
    if not on_cuda:
        operators: Any = torch.ops.trimkv
        operators.attend, operators.attend_pool, operators.evict = attend, attend_pool, evict
    for config, kind, gates in ((HEADS, CompiledEngine, "rg"), (SHARED, CompiledPooledEngine, "rg10")):
        model = gated_model("qwen3-gqa", gates)
        engine = kind(moved(model, place if on_cuda else "cpu"), config, compiled=on_cuda)
        if on_cuda:
            engine.warm_up()
        course(engine, eager_engine(model, config), 6)
        print(config.policy, "agrees")
        batch(config, gates, place if on_cuda else "cpu", on_cuda)
        print(config.policy, "agrees in a batch")


if __name__ == "__main__":
    main(sys.argv[1])
