"""Int8 keys and values: levels by hand, what a cache holds, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trimkv_edge.budget import ModelShape, cache_bytes, parse_budget
from trimkv_edge.cache import StaticCache, new_cache
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.kv_scales import KVScales, from_int8, load_scales, to_int8

SHAPE = ModelShape(2, 0, 0, 0, 3, 4, 0, 0)
CONFIG = CacheConfig(8, 4, 4, kv_dtype="int8")


def scales(layers: int = 2, heads: int = 3, width: int = 4) -> KVScales:
    table = np.linspace(0.01, 0.3, layers * heads * width, dtype=np.float32).reshape(layers, heads, width)
    return KVScales(table, table[::-1].copy())


def test_levels_by_hand() -> None:
    scale = np.array([0.5, 0.1], np.float32)
    rows = np.array([[1.24, 0.26], [0.25, -0.15], [-100.0, 100.0], [0.75, 0.0]], np.float32)
    want = [[2, 3], [0, -1], [-128, 127], [2, 0]]  # halves go to the even level: 0.5 -> 0, 1.5 -> 2; -1.5 is -1.4999...
    got = to_int8(rows, scale)
    assert got[[0, 2, 3]].tolist() == [want[0], want[2], want[3]]
    assert got[1, 0] == 0
    assert got[1, 1] in (-1, -2)
    np.testing.assert_allclose(from_int8(got, scale)[0], [1.0, 0.3], rtol=1e-6)


def test_what_was_stored_is_stored_again_without_loss() -> None:
    table = scales().key
    levels = np.random.default_rng(0).integers(-128, 128, (2, 3, 50, 4)).astype(np.int8)
    np.testing.assert_array_equal(to_int8(from_int8(levels, table), table), levels)


def test_the_cache_holds_numbers_of_the_grid() -> None:
    held = scales()
    cache = StaticCache(CONFIG, 2, 3, 4, scales=held)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 3, 4, 4, generator=generator) for _ in range(2))
    cache.attend(1, torch.randn(1, 3, 4, 4, generator=generator), key, value, 0.5)
    for stored, rows, table in ((cache.key, key, held.key), (cache.value, value, held.value)):
        want = from_int8(to_int8(rows[0].numpy(), table[1]), table[1])
        np.testing.assert_allclose(stored[1][0, :, :4].numpy(), want, rtol=1e-6)


def test_settings_that_cannot_be_honoured() -> None:
    with pytest.raises(ConfigError, match=r"KV dtype 'int4' is not known: use one of float32, float16, bfloat16, int8"):
        CacheConfig(8, 4, 4, kv_dtype="int4")
    with pytest.raises(ConfigError, match="needs its scales"):
        StaticCache(CONFIG, 2, 3, 4)
    with pytest.raises(ConfigError, match="no other has them"):
        StaticCache(CacheConfig(8, 4, 4), 2, 3, 4, scales=scales())
    with pytest.raises(ConfigError, match="no other has them"):
        StaticCache(CacheConfig(8, 4, 4, kv_dtype="float16"), 2, 3, 4, scales=scales())
    with pytest.raises(ConfigError, match="policy global keeps float32 keys and values only"):
        new_cache(CacheConfig(8, 4, 4, policy="global", kv_dtype="int8"), 2, 3, 4)
    with pytest.raises(ConfigError, match="positive and finite"):
        KVScales(np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32))
    with pytest.raises(ConfigError, match="alike for keys and values"):
        KVScales(np.ones((1, 1, 2), np.float32), np.ones((1, 1, 3), np.float32))


def test_a_quarter_of_the_bytes() -> None:
    # 12 slots x 6 heads x (2 x 4 x 1 + 4) bytes, and 8 positions x 6 x 8.
    assert cache_bytes(SHAPE, CONFIG, "float32") == 12 * 6 * 12 + 8 * 6 * 8
    assert cache_bytes(SHAPE, CacheConfig(8, 4, 4), "float32") == 12 * 6 * 36 + 8 * 6 * 8
    assert cache_bytes(SHAPE, CacheConfig(8, 4, 4, kv_dtype="float16"), "float32") == 12 * 6 * 20 + 8 * 6 * 8
    total = cache_bytes(SHAPE, CONFIG, "float32")
    assert parse_budget(f"{total}B", SHAPE, 4, "int8") == 8


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "kv_scales.npz"
    scales().save(path)
    read = load_scales(path, (2, 3, 4))
    np.testing.assert_array_equal(read.key, scales().key)
    np.testing.assert_array_equal(read.value, scales().value)
    with pytest.raises(ArtefactError, match=r"shape \(2, 3, 4\), but the manifest means \(2, 3, 8\)"):
        load_scales(path, (2, 3, 8))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], b"\x80\x04N."):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match="holds no KV scales"):
            load_scales(path, (2, 3, 4))
