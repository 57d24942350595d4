"""Keys and values as int8: one fixed scale for each channel of each KV head. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from trimkv_edge.errors import ArtefactError, ConfigError

FloatArray = npt.NDArray[np.float32]
LEVELS = 127


@dataclass(frozen=True)
class KVScales:
    """Scales of a model's keys (after RoPE) and values.

    A number x of a channel is stored as ``clip(round_half_even(x / scale), -128, 127)`` and read as that times
    ``scale``, which is what ONNX Runtime's attention does with a per-channel int8 cache.

    Attributes:
        key, value: float32 ``[layers, kv_heads, head_dim]``, positive.

    Raises:
        ConfigError: shapes that differ, or a scale that is not positive and finite.
    """

    key: FloatArray
    value: FloatArray

    def __post_init__(self) -> None:
        if self.key.shape != self.value.shape or self.key.ndim != 3:
            raise ConfigError(
                f"KV scales have shapes {self.key.shape} and {self.value.shape}, but must be "
                "[layers, kv_heads, head_dim], alike for keys and values"
            )
        for table in (self.key, self.value):
            if not (np.isfinite(table).all() and (table > 0).all()):
                raise ConfigError("KV scales must be positive and finite: calibrate them again")

    def save(self, path: Path) -> None:
        """As an uncompressed ``.npz``."""
        with path.open("wb") as file:
            np.savez(file, key=self.key, value=self.value)


def load_scales(path: Path, shape: tuple[int, int, int]) -> KVScales:
    """Reads what :meth:`KVScales.save` wrote.

    Args:
        path: the file.
        shape: ``(layers, kv_heads, head_dim)`` of the model.

    Raises:
        ArtefactError: the file cannot be read, or is for another model.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            scales = KVScales(file["key"].astype(np.float32), file["value"].astype(np.float32))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"{path} holds no KV scales ({reason}): copy the whole folder or export it again"
        ) from error
    if scales.key.shape != shape:
        raise ArtefactError(
            f"{path} has KV scales of shape {scales.key.shape}, but the manifest means {shape}: "
            "files of two artefacts are mixed, export it again"
        )
    return scales


def to_int8(rows: FloatArray, scale: FloatArray) -> npt.NDArray[np.int8]:
    """``rows [..., slots, head_dim]``, ``scale [..., head_dim]`` -> int8."""
    return np.clip(np.rint(rows / scale[..., None, :]), -LEVELS - 1, LEVELS).astype(np.int8)


def from_int8(rows: npt.NDArray[Any], scale: FloatArray) -> FloatArray:
    """The inverse of :func:`to_int8` on what it gave."""
    return np.asarray(rows.astype(np.float32) * scale[..., None, :], np.float32)
