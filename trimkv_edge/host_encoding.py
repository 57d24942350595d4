"""Integers of few bits for a quantised graph's inputs and outputs: one scale and zero point each. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import FloatArray
from trimkv_edge.errors import ConfigError

DTYPES = ("uint8", "uint16")


@dataclass(frozen=True)
class Encoding:
    """``real = (stored - zero_point) * scale``.

    Attributes:
        dtype: ``uint8`` or ``uint16``.
        scale: above 0; zero_point: within the type.

    Raises:
        ConfigError: out of range.
    """

    dtype: str
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"an encoding's type is {self.dtype!r}, but must be one of {', '.join(DTYPES)}")
        if not (self.scale > 0 and np.isfinite(self.scale)):
            raise ConfigError(f"an encoding's scale is {self.scale}, but must be above 0")
        if not 0 <= self.zero_point <= np.iinfo(self.dtype).max:
            raise ConfigError(f"an encoding's zero point is {self.zero_point}, which {self.dtype} does not hold")

    def store(self, real: FloatArray) -> npt.NDArray[Any]:
        """The nearest integers, ties to even; what is out of range becomes the end of the range."""
        limit = np.iinfo(self.dtype).max
        scaled = np.rint(real / np.float32(self.scale)) + self.zero_point
        return np.clip(scaled, 0, limit).astype(self.dtype)

    def real(self, stored: npt.NDArray[Any]) -> FloatArray:
        """float32."""
        return (stored.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)
