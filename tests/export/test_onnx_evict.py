"""The evict graph alone against the torch functions, over random and tied scores."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import event_positions, plan_moves, select_survivors
from trimkv_edge.export.onnx_evict import evict_model
from trimkv_edge.policies.base import Entries

LAYERS, HEADS, WIDTH = 2, 3, 5
CONFIGS = [
    CacheConfig(budget=12, buffer=5, prefill_chunk=5),
    CacheConfig(budget=4, buffer=9, prefill_chunk=4),
    CacheConfig(budget=1, buffer=1, prefill_chunk=1),
    CacheConfig(budget=12, buffer=5, prefill_chunk=5, sinks=3, recent=4),
    CacheConfig(budget=6, buffer=8, prefill_chunk=2, sinks=6),
]


def state(config: CacheConfig, seen: int, levels: int, seed: int) -> dict[str, np.ndarray]:
    """A cache in mid-stream; few ``levels`` of log-beta and ages make ties."""
    rng = np.random.default_rng(seed)
    rows, shape = LAYERS * HEADS, (1, HEADS, config.slots, WIDTH)
    old = seen - config.buffer
    out = {f"{i}.{kind}": rng.standard_normal(shape, np.float32) for i in range(LAYERS) for kind in ("key", "value")}
    table = np.concatenate([[0.0], -np.exp2(-np.arange(1, levels, dtype=np.float32))]).astype(np.float32)
    out["log_beta"] = table[rng.integers(0, levels, (config.slots, rows))]
    out["positions"] = np.stack([rng.permutation(old)[: config.budget] for _ in range(rows)]).astype(np.int64)
    return out


def run(session: onnxruntime.InferenceSession, state: dict[str, np.ndarray], seen: int) -> dict[str, np.ndarray]:
    inputs = {f"past.{name}": array for name, array in state.items()} | {"seen": np.array([seen])}
    names = [value.name for value in session.get_outputs()]
    return {name.removeprefix("present."): array for name, array in zip(names, session.run(names, inputs), strict=True)}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_agrees_with_torch_bit_for_bit(config: CacheConfig) -> None:
    model = evict_model(config, LAYERS, HEADS, WIDTH)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for seed in range(20):
        # The last stream is past 2^24, where float32 cannot tell positions apart but can tell ages.
        seen = config.slots + [0, 1, 30, 2**24][seed % 4]
        before = state(config, min(seen, config.slots + 30), (1, 2, 4, 40)[seed // 5], seed)
        before["positions"] += seen - min(seen, config.slots + 30)
        after = run(session, before, seen)
        log_beta = torch.from_numpy(before["log_beta"]).T
        where = event_positions(torch.from_numpy(before["positions"]), torch.tensor([seen]), config.buffer)
        keep = select_survivors(Entries(log_beta, where, seen), config)
        to, origin = plan_moves(keep, config.budget)
        moved = where.scatter(1, to, where.gather(1, origin))
        np.testing.assert_array_equal(after["positions"], moved[:, : config.budget])
        np.testing.assert_array_equal(
            after["log_beta"].T[:, : config.budget],
            log_beta.scatter(1, to, log_beta.gather(1, origin))[:, : config.budget],
        )
        for row in range(LAYERS * HEADS):
            layer, head = divmod(row, HEADS)
            order = np.arange(config.slots)
            order[to[row].numpy()] = origin[row].numpy()
            for kind in ("key", "value"):
                name = f"{layer}.{kind}"
                np.testing.assert_array_equal(
                    after[name][0, head, : config.budget], before[name][0, head, order[: config.budget]]
                )
            assert set(moved[row, : config.budget].tolist()) == set(where[row][keep[row]].tolist())
