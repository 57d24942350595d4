"""Bytes against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_edge.budget import (
    ModelShape,
    cache_bytes,
    check_fits,
    entry_bytes,
    estimate_memory,
    format_bytes,
    full_cache_bytes,
    parse_budget,
)
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30
PHI3 = ModelShape(32, 3072, 8192, 32, 32, 96, 32064, 3_821_079_552)
SMALL = ModelShape(2, 64, 96, 4, 2, 16, 320, 100_000)


def test_phi3_full_cache_by_hand() -> None:
    # 32 layers x 32 heads x 96 values x (key + value) x 2 bytes = 393216 = 384 KiB per token.
    assert full_cache_bytes(PHI3, 1, "float16") == 384 * KIB
    assert full_cache_bytes(PHI3, 32 * 1024, "bfloat16") == 12 * GIB
    assert full_cache_bytes(PHI3, 2048, "float16") == 768 * MIB
    assert full_cache_bytes(PHI3, 2048, "float32") == 1536 * MIB


def test_phi3_bounded_cache_by_hand() -> None:
    # Per slot: 393216 for K and V, and 1024 rows x 4 bytes of log_beta; positions: 2048 x 1024 x 8 bytes.
    assert entry_bytes(PHI3, "float16") == 397_312
    assert cache_bytes(PHI3, CacheConfig(2048), "float16") == 2176 * 397_312 + 16_777_216 == 881_328_128


def test_small_bounded_cache_by_hand() -> None:
    # 4 rows x (2 x 16 x 4 + 4) = 528 per slot; 4 rows x 8 = 32 more per kept slot.
    assert entry_bytes(SMALL, "float32") == 528
    assert cache_bytes(SMALL, CacheConfig(8, 4, 4), "float32") == 12 * 528 + 8 * 32


def test_estimate_adds_up() -> None:
    estimate = estimate_memory(PHI3, CacheConfig(2048), "float16")
    assert (estimate.cache, estimate.weights) == (881_328_128, 2 * 3_821_079_552)
    assert estimate.workspace > 0
    assert estimate.peak == estimate.cache + estimate.weights + estimate.workspace
    assert estimate_memory(PHI3, CacheConfig(4096), "float16").workspace > estimate.workspace


@pytest.mark.parametrize("text", ["512", " 512 ", "512\n"])
def test_entries(text: str) -> None:
    assert parse_budget(text, SMALL, 128, "float32") == 512


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("64MB", 64 * MIB),
        ("64 mb", 64 * MIB),
        ("64M", 64 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("80kib", 80 * KIB),
        ("71200B", 71200),
    ],
)
def test_sizes(text: str, total: int) -> None:
    # The ring takes 128 x 528 = 67584; each kept entry 560.
    assert parse_budget(text, SMALL, 128, "float32") == (total - 67_584) // 560


@pytest.mark.parametrize(
    "text", ["abc", "-3", "1e3", "", "1.5", "MB", "12TB", "64 MB extra", "0x10", "nan", "inf", "1,5GB"]
)
def test_not_a_budget(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_budget(text, SMALL, 128, "float32")
    assert repr(text) in str(caught.value)
    assert "64MB" in str(caught.value)


@pytest.mark.parametrize("text", ["10KB", "0MB", "66KiB", "68143B"])
def test_bytes_that_hold_nothing(text: str) -> None:
    with pytest.raises(BudgetError, match=r"128 entries.*66\.0 KiB.*raise --budget or lower --buffer"):
        parse_budget(text, SMALL, 128, "float32")
    assert parse_budget("68144B", SMALL, 128, "float32") == 1


def test_zero_entries_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match="budget is 0"):
        CacheConfig(parse_budget("0", SMALL, 128, "float32"))


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("unit", ["", "GB"])
def test_absurd_numbers_do_not_crash(digits: int, unit: str) -> None:
    with pytest.raises(ConfigError):
        CacheConfig(parse_budget("9" * digits + unit, SMALL, 128, "float32"), sinks=-1)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4 * 10**9),
    st.integers(1, 256),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.builds(ModelShape, *[st.integers(1, 64)] * 8),
)
def test_a_byte_budget_is_used_up_and_never_exceeded(total: int, buffer: int, dtype: str, shape: ModelShape) -> None:
    try:
        budget = parse_budget(f"{total}B", shape, buffer, dtype)
    except BudgetError:
        assert cache_bytes(shape, CacheConfig(1, buffer, 1), dtype) > total
        return
    assert cache_bytes(shape, CacheConfig(budget, buffer, 1), dtype) <= total
    assert cache_bytes(shape, CacheConfig(budget + 1, buffer, 1), dtype) > total


def test_check_fits() -> None:
    check_fits(10 * MIB, "the model", available=10 * MIB)
    check_fits(1, "the model")
    with pytest.raises(BudgetError, match=r"the model needs 2\.00 GiB, but 1\.5 KiB.*lower --budget"):
        check_fits(2 * GIB, "the model", available=1536)
    with pytest.raises(BudgetError):
        check_fits(2**60, "the model")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (768 * MIB, "768.0 MiB"),
        (12 * GIB, "12.00 GiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match=r"'int3'.*float32"):
        entry_bytes(SMALL, "int3")
