"""The fused eviction kernel against the oracle; run by ``test_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from gpu_events import DEVICE, Event, event, events
from hypothesis import given, settings

from trimkv_edge.errors import ConfigError
from trimkv_edge.gpu.kernels.evict import evict


@settings(max_examples=40, deadline=None)
@given(events())
def test_every_slot_equals_the_oracle(case: Event) -> None:
    case.check(evict, DEVICE)


@pytest.mark.parametrize("kind", ["plain", "levels", "zeros"])
@pytest.mark.parametrize(("budget", "buffer"), [(64, 32), (100, 28), (33, 50)])
def test_sizes_around_powers_of_two(budget: int, buffer: int, kind: str) -> None:
    event((2, 3, 2, 6), budget, buffer, 1, kind, sinks=2, recent=3, dtype=torch.bfloat16).check(evict, DEVICE)


def test_more_movers_than_one_block_of_rows() -> None:
    case = event((1, 1, 1, 3), 40, 40, 3)
    case.due[:] = True
    case.tables[2][..., :40] = -1.0
    case.tables[2][..., 40:] = 0.0
    case.check(evict, DEVICE)


def test_tables_must_be_contiguous() -> None:
    case = event((2, 2, 2, 3), 8, 4, 0)
    key, value, log_beta, positions = case.tables
    with pytest.raises(ConfigError, match="contiguous"):
        evict(key, value, log_beta.transpose(0, 1), positions, case.seen, case.due, 8, 0, 0)
