"""What enters and leaves a compiled graph: in which numbers, and in which order. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter

from trimkv_edge.engine import FloatArray
from trimkv_edge.errors import ConfigError
from trimkv_edge.files import replace_text
from trimkv_edge.host_json import read_json

DTYPES = ("float32", "int8", "int16", "uint8", "uint16")
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Encoding:
    """``real = (stored - zero_point) * scale``; float32 is stored as it is.

    Attributes:
        dtype: one of :data:`DTYPES`.
        scale: above 0; zero_point: within the type. 1 and 0 for float32.

    Raises:
        ConfigError: out of range.
    """

    __pydantic_config__ = _STRICT
    dtype: str
    scale: float = 1.0
    zero_point: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"an encoding's type is {self.dtype!r}, but must be one of {', '.join(DTYPES)}")
        if self.dtype == "float32":
            if (self.scale, self.zero_point) != (1, 0):
                raise ConfigError(
                    f"float32 has scale {self.scale} and zero point {self.zero_point}, but must have 1, 0"
                )
            return
        if not (self.scale > 0 and np.isfinite(self.scale)):
            raise ConfigError(f"an encoding's scale is {self.scale}, but must be above 0")
        limits = np.iinfo(self.dtype)
        if not limits.min <= self.zero_point <= limits.max:
            raise ConfigError(f"an encoding's zero point is {self.zero_point}, which {self.dtype} does not hold")

    def store(self, real: FloatArray) -> npt.NDArray[Any]:
        """The nearest integers, ties to even; what is out of range becomes the end of the range."""
        if self.dtype == "float32":
            return real
        limits = np.iinfo(self.dtype)
        rounded = np.rint(real.astype(np.float64) / self.scale) + self.zero_point
        return np.clip(rounded, limits.min, limits.max).astype(self.dtype)

    def real(self, stored: npt.NDArray[Any]) -> FloatArray:
        """float32."""
        if self.dtype == "float32":
            return stored.astype(np.float32, copy=False)
        return ((stored.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Port(Encoding):
    """One tensor at the border of a graph; ``name`` as in :mod:`trimkv_edge.export.host_evicted`."""

    name: str


@dataclass(frozen=True)
class Border:
    """Inputs and outputs of one graph, in its own order."""

    __pydantic_config__ = _STRICT
    inputs: list[Port]
    outputs: list[Port]


_ADAPTER = TypeAdapter(dict[str, Border])


def save_borders(borders: dict[str, Border], path: Path) -> None:
    """Writes borders by graph as JSON."""
    replace_text(path, json.dumps({name: asdict(border) for name, border in borders.items()}, indent=1) + "\n")


def load_borders(path: Path) -> dict[str, Border]:
    """Reads what :func:`save_borders` wrote; raises :class:`ArtefactError` if that is not possible."""
    return read_json(path, _ADAPTER)
