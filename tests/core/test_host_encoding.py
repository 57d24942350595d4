"""Integers at the border of a quantised graph."""

from __future__ import annotations

import numpy as np
import pytest

from trimkv_edge.errors import ConfigError
from trimkv_edge.host_encoding import Encoding


@pytest.mark.parametrize(
    ("encoding", "real", "stored", "back"),
    [
        # 0.5 and 1.5 steps go to the even neighbour; what is outside takes the end of the range.
        (Encoding("uint8", 0.5, 10), [0, 0.25, 0.75, -5, -9, 200], [10, 10, 12, 0, 0, 255], [0, 0, 1, -5, -5, 122.5]),
        (Encoding("uint16", 2.0, 0), [-1, 3, 131070, 1e9], [0, 2, 65535, 65535], [0, 4, 131070, 131070]),
    ],
)
def test_numbers(encoding: Encoding, real: list[float], stored: list[int], back: list[float]) -> None:
    kept = encoding.store(np.array(real, np.float32))
    assert (kept.dtype.name, kept.tolist()) == (encoding.dtype, stored)
    assert encoding.real(kept).dtype == np.float32
    assert encoding.real(kept).tolist() == back


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_integer_comes_back(dtype: str) -> None:
    """What a graph gave is the same after a host has turned it into float32 and back, for awkward scales too."""
    every = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    for scale in (1 / 3, 1.17e-4, 7.3):
        encoding = Encoding(dtype, scale, int(every[-1]) // 3)
        np.testing.assert_array_equal(encoding.store(encoding.real(every)), every)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (("int4", 1.0, 0), "must be one of uint8, uint16"),
        (("uint8", 0.0, 0), "must be above 0"),
        (("uint8", float("nan"), 0), "must be above 0"),
        (("uint8", 1.0, 256), "which uint8 does not hold"),
    ],
)
def test_what_is_no_encoding(fields: tuple[str, float, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Encoding(*fields)
