"""bfloat16 as numpy holds it, which has no such type: its bits, as uint16. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]


def to_bfloat16(values: npt.NDArray[Any]) -> Bits:
    """The nearest bfloat16 of each float32, the even one of two; any NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: Bits) -> npt.NDArray[np.float32]:
    """float32 of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
