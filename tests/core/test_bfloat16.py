"""bfloat16 in numpy against torch's."""

from __future__ import annotations

import numpy as np
import torch

from trimkv_edge.bfloat16 import from_bfloat16, to_bfloat16


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = from_bfloat16(bits)
    want = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, want)
    back = to_bfloat16(values)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(back[numbers], bits[numbers])
    assert np.isnan(from_bfloat16(back[~numbers])).all()


def test_numbers_between_two_are_rounded_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Halves and their neighbours, and what rounds up to infinity.
    upper = bits[:30_000] & np.uint32(0xFFFF0000)
    edges = [0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001, 0x00008000, 0x80018000]
    bits = np.concatenate([bits, upper | 0x7FFF, upper | 0x8000, upper | 0x8001, np.array(edges, np.uint32)])
    values = bits.view(np.float32)
    numbers = ~np.isnan(values)
    want = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values))[numbers], want[numbers])


def test_shapes_and_views_are_kept() -> None:
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    bits = to_bfloat16(values)
    assert (bits.shape, bits.dtype) == ((4, 2, 3), np.uint16)
    np.testing.assert_array_equal(from_bfloat16(bits), torch.from_numpy(values.copy()).bfloat16().float().numpy())
