"""What enters and leaves a compiled graph, in order, and in which numbers. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from trimkv_edge.engine import FloatArray
from trimkv_edge.errors import ArtefactError
from trimkv_edge.files import replace_text

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Port:
    """One tensor at the border of a graph.

    Attributes:
        name: as in :mod:`trimkv_edge.export.host_evicted`.
        dtype: ``float32``, ``int8`` or ``int16``.
        scale, zero_point: a real number is ``(stored - zero_point) * scale``; 1 and 0 for float32.
    """

    __pydantic_config__ = _STRICT
    name: str
    dtype: str
    scale: float = 1.0
    zero_point: int = 0

    def store(self, numbers: FloatArray) -> npt.NDArray[Any]:
        """float32 -> what the graph takes, rounded to even and cut to the range of its type."""
        if self.dtype == "float32":
            return numbers
        limits = np.iinfo(self.dtype)
        rounded = np.rint(numbers.astype(np.float64) / self.scale) + self.zero_point
        return np.clip(rounded, limits.min, limits.max).astype(self.dtype)

    def read(self, stored: npt.NDArray[Any]) -> FloatArray:
        """What the graph gave -> float32."""
        if self.dtype == "float32":
            return stored.astype(np.float32, copy=False)
        return ((stored.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


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
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ArtefactError(f"{path} cannot be read ({reason}): copy the whole folder again or export again") from error
