"""Packed parts of an ExecuTorch program: files until the program is written, and the start of the next export if not.

XNNPACK packs a model part by part, some for each layer. A finished part is a file for each block of bytes and a
``.json`` record, written last. Its name is a digest of all that it was packed from but the weights themselves; those
follow from the key of the folder (:mod:`trimkv_edge.export.resume`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trimkv_edge.files import replace_text

# Smaller blocks are in memory: they are not worth a file.
_SPILLED = 2**16


class PackedParts:
    """Where packed parts lie until the program is written.

    Args:
        folder: for the bytes; None: they stay in memory.
        keep: whether finished parts are found again by a later export.
    """

    def __init__(self, folder: Path | None = None, keep: bool = False) -> None:
        self._folder, self.keep = folder, keep and folder is not None

    def done(self) -> int:
        """Bytes of weights in the parts that an interrupted export left."""
        if not self.keep or self._folder is None:
            return 0
        records = (_read(path) for path in self._folder.glob("*.json"))
        return sum(record["weights"] for record in records if record is not None)

    def find(self, name: str) -> Any | None:
        """What XNNPACK's ``preprocess`` returned for a part, or None."""
        from executorch.exir._serialize._cord import FileBackedData
        from executorch.exir._serialize._named_data_store import DataEntry, NamedDataStoreOutput
        from executorch.exir.backend.backend_details import PreprocessResult

        if not self.keep or self._folder is None:
            return None
        record = _read(self._folder / f"{name}.json")
        if record is None:
            return None
        program, *blocks = (self._folder / file for file in record["files"])
        buffers = [
            FileBackedData(str(path)) if path.stat().st_size >= _SPILLED else path.read_bytes() for path in blocks
        ]
        entries = {key: DataEntry(index, alignment, None) for key, (index, alignment) in record["entries"].items()}
        return PreprocessResult(program.read_bytes(), {}, NamedDataStoreOutput(buffers, entries, {}))

    def put(self, name: str, result: Any, weights: int) -> None:
        """Moves the bytes of ``preprocess``'s result to files.

        Args:
            name: see :func:`part_name`; weights: bytes of the weights in it.
        """
        store = result.data_store_output
        if self._folder is None:
            return
        if not self.keep or not weights or _odd(result):
            store.buffers[:] = [_spill(block, self._folder) for block in store.buffers]
            return
        from executorch.exir._serialize._cord import FileBackedData

        sizes = {}
        for number, block in enumerate([result.processed_bytes, *store.buffers]):
            path = self._folder / f"{name}-{number}.packed"
            _write(path, block)
            sizes[path.name] = len(block)
            if number and len(block) >= _SPILLED:
                store.buffers[number - 1] = FileBackedData(str(path))
        entries = {key: (entry.buffer_index, entry.alignment) for key, entry in store.pte_data.items()}
        record = {"files": sizes, "entries": entries, "weights": weights}
        replace_text(self._folder / f"{name}.json", json.dumps(record))


def part_name(program: ExportedProgram, specs: list[Any], late: Container[str]) -> str:
    """Digest of what XNNPACK packs a part from, but for the values of the tensors in ``late``."""
    seen = hashlib.sha256()
    for node in program.graph.nodes:
        seen.update(f"{node.format_node()} {node.meta.get('val')} {node.meta.get('debug_handle')}\n".encode())
    seen.update(f"{program.graph_signature} {program.range_constraints} {specs}".encode())
    for name, tensor in (*program.state_dict.items(), *program.constants.items()):
        seen.update(name.encode())
        if name not in late and isinstance(tensor, Tensor):
            seen.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()[:32]


def _odd(result: Any) -> bool:
    """Whether a result holds what records have no place for; XNNPACK's never do so far."""
    store = result.data_store_output
    layouts = any(entry.tensor_layout is not None for entry in store.pte_data.values())
    extra = result.debug_handle_map or result._delegate_info_meta or store.external_data
    return bool(layouts or extra or not all(isinstance(block, bytes) for block in store.buffers))


def _read(path: Path) -> dict[str, Any] | None:
    """A record whose files are all there."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = all((path.parent / name).stat().st_size == size for name, size in record["files"].items())
        return record if whole and isinstance(record["weights"], int) and record["entries"] is not None else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, block: bytes) -> None:
    with path.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _spill(block: Any, folder: Path) -> Any:
    from executorch.exir._serialize._cord import FileBackedData

    if not isinstance(block, bytes) or len(block) < _SPILLED:
        return block
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".packed", delete=False) as file:
        file.write(block)
    return FileBackedData(file.name, cleanup=True)
