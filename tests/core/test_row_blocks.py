"""The event in blocks of rows of like size keeps what the event over all rows at once keeps, and the lists too."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.row_blocks import pooled_event, put_back, rows_by_size


def test_blocks_by_hand() -> None:
    config = CacheConfig(20, 8, 8, "global", caps=((72, 32), (31, 8), (12, 33)))
    # Slots 80, 40, 39, 16, 20, 41: above 40, above 20, above 10.
    assert rows_by_size(config) == [((0, 5), 80), ((1, 2), 40), ((3, 4), 20)]
    assert rows_by_size(CacheConfig(8, 8, 8, "global", caps=((8, 9),))) == [((0, 1), 17)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_event_keeps_what_the_lists_keep(data: st.DataObject) -> None:
    layers, heads, buffer = 3, 2, data.draw(st.sampled_from([1, 4, 7]))
    caps = [data.draw(st.sampled_from([2, 3, 5, 9, 20, 40])) for _ in range(layers * heads)]
    policy = data.draw(st.sampled_from(["global", "layer"]))
    by_layer = [sum(caps[i : i + heads]) // heads for i in range(0, layers * heads, heads)]
    budget = data.draw(st.integers(2, max(2, min([*by_layer, sum(caps) // 6]))))
    floor = data.draw(st.integers(0, 2))
    threshold = data.draw(st.sampled_from([0.0, 0.3]))
    table = tuple(tuple(caps[i : i + heads]) for i in range(0, layers * heads, heads))
    if sum(caps) < budget * 6:
        return
    config = CacheConfig(budget, buffer, 1, policy, min_per_head=floor, threshold=threshold, caps=table)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    kept = np.array([rng.integers(0, cap + 1) for cap in caps])
    while kept.sum() > budget * 6 or (policy == "layer" and (kept.reshape(3, 2).sum(1) > budget * 2).any()):
        kept = kept // 2
    seen = budget + buffer * 40  # more than any cap
    width = max(caps) + buffer
    log_beta = -np.ceil(rng.exponential(1, (6, width)) * 2).astype(np.float32) / 2
    positions = np.zeros((6, max(caps)), np.int64)
    oracle = OracleCache(
        layers, heads, budget, buffer, policy=policy, min_per_head=floor, threshold=threshold, caps=table
    )
    for row in range(6):
        old = np.sort(rng.choice(seen - buffer, kept[row], replace=False))
        positions[row, : kept[row]] = old
        for slot, position in enumerate([*old, *range(seen - buffer, seen)]):
            oracle.append(*divmod(row, heads), int(position), float(log_beta[row, slot]))
    tensors = (torch.from_numpy(log_beta), torch.from_numpy(positions), torch.from_numpy(kept).unsqueeze(1))
    blocks = pooled_event(*tensors, torch.tensor([seen]), torch.tensor([buffer]), layers, config)
    assert oracle.end_step(seen)
    assert sorted(row for block in blocks for row in block.rows) == list(range(6))
    lengths = put_back([block.lengths for block in blocks], blocks, 1)
    for block in blocks:
        for number, row in enumerate(block.rows):
            count = int(block.lengths[number, 0])
            assert int(lengths[row, 0]) == count
            slots = list(range(count))
            holes, movers = (mask[number].nonzero().flatten().tolist() for mask in (block.holes, block.movers))
            assert len(holes) == len(movers)
            for hole, mover in zip(holes, movers, strict=True):
                slots[hole] = mover
            held = sorted(block.positions[number, slots].tolist())
            assert held == oracle.positions(*divmod(row, heads))
