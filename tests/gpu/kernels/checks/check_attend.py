"""Attention kernels against a float64 brute force; run by ``test_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from gpu_attention import Chunk, Pool, chunk, chunks, pool, pools
from gpu_events import DEVICE
from hypothesis import given, settings

from trimkv_edge.errors import ConfigError
from trimkv_edge.gpu.kernels.attend import Shares, attend, attend_pool


@settings(max_examples=40, deadline=None)
@given(chunks())
def test_chunks_equal_the_brute_force(case: Chunk) -> None:
    case.check(attend, DEVICE)


@settings(max_examples=25, deadline=None)
@given(pools())
def test_pools_equal_the_brute_force(case: Pool) -> None:
    case.check(attend_pool, DEVICE)


@pytest.mark.parametrize("live", [0, 31, 63, 64, 65, 127, 199])
@pytest.mark.parametrize(
    ("group", "width", "dtype"), [(1, 96, torch.bfloat16), (4, 128, torch.float16), (3, 64, torch.float32)]
)
def test_one_token_at_lengths_around_blocks(live: int, group: int, width: int, dtype: torch.dtype) -> None:
    chunk([live, 199 - live], 200, 1, 2, group, width, dtype).check(attend, DEVICE)


@pytest.mark.parametrize("programs", [1, 7, 64, 4096])
@pytest.mark.parametrize(("block", "queries"), [(16, 16), (64, 32)])
def test_any_cut_gives_the_same_attention(block: int, queries: int, programs: int) -> None:
    shares = Shares(block=block, queries=queries, programs=programs)
    for count in (1, 33):
        chunk([0, 60, 129], 170, count, 1, 2).check(lambda *case: attend(*case, shares), DEVICE)
    pool([[1, 200], [17, 64]], group=2).check(lambda *case: attend_pool(*case, shares), DEVICE)


def test_large_logits() -> None:
    """Softmax in blocks: the largest logit comes first, last, and in the middle."""
    for at in (0, 70, 149):
        case = chunk([149], 150, 1, 1)
        case.key[0, 0, at] = 40.0 * case.query[0, 0, 0]
        case.check(attend, DEVICE)


def test_rows_must_be_contiguous() -> None:
    case = chunk([5], 8)
    with pytest.raises(ConfigError, match="last dimension"):
        attend(case.query, case.key.transpose(2, 3).contiguous().transpose(2, 3), case.value, case.live, 1.0)
