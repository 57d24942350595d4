"""bfloat16 safetensors without torch, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt


def bfloat16_tensors(folder: Path) -> dict[str, tuple[Path, int, list[int]]]:
    """File, offset in bytes and shape of each tensor in a folder's safetensors files.

    Raises:
        SystemExit: a tensor is not bfloat16.
    """
    found: dict[str, tuple[Path, int, list[int]]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} in {path} is {entry['dtype']}, but this reads BF16 only")
            found[name] = (path, 8 + size + entry["data_offsets"][0], entry["shape"])
    return found


def read_tensor(path: Path, offset: int, shape: list[int]) -> npt.NDArray[np.float32]:
    """A bfloat16 tensor, widened: its bits are the upper half of a float32's."""
    halves = np.fromfile(path, np.uint16, int(np.prod(shape)), offset=offset)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(shape)
