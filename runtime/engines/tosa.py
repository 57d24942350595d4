"""The engine of TOSA graphs: Arm's reference model of the standard, driven by the numpy host (docs/npu.md). Slow."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, ConfigError, StateError, TrimKVError
from trimkv_edge.host_border import Border, load_borders
from trimkv_edge.host_cache import HostCache
from trimkv_edge.host_constants import load_constants
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine


class TosaEngine(HostEvictedEngine):
    """Runs the ``tosa`` target of an artefact, to check it: the reference model is made to be right, not fast.

    Graphs of integers get and give integers; what the cache holds is float32, and each number of it one that the graph
    gave.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: 1, or None.

    Raises:
        ConfigError: more threads, a profile, or settings that a host does not run.
        ArtefactError: a file is missing or cannot be read.
        TrimKVError: the reference model is not installed.
    """

    name = "tosa"

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        ArtefactEngine.__init__(self, folder, manifest, target, threads)
        if profile or (threads or 1) > 1:
            raise ConfigError("engine tosa is a reference of Arm's standard: leave out --profile, and use 1 thread")
        self._reference = _import_reference()
        self.threads = 1
        constants = load_constants(self._file("constants"))
        self._rotary, self._masked = constants.rotary, constants.masked
        self._embedding = self._load_embedding(manifest.model.hidden_size)
        borders = load_borders(self._file("borders"))
        names = {1: "decode", self.config.prefill_chunk: "prefill" if self.config.prefill_chunk > 1 else "decode"}
        if missing := set(names.values()) - set(borders):
            raise ArtefactError(f"{self._file('borders')} lacks {', '.join(missing)}: export the artefact again")
        self._compiled: dict[int, tuple[bytes, Border]] = {
            chunk: (self._file(name).read_bytes(), borders[name]) for chunk, name in names.items()
        }
        self._open_cache()

    def _open_cache(self) -> None:
        self._cache = HostCache(self.config, self.num_layers, self.num_kv_heads, self.head_dim, masked=self._masked)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        chunk = 1 if ids.size == 1 else self.config.prefill_chunk
        layers = range(self.num_layers)
        found = self._run(chunk, {**self._rows(ids, position, chunk), **self._past()})
        key, value = (
            np.concatenate([found[f"new.{layer}.{kind}"].reshape(1, -1, chunk, self.head_dim) for layer in layers])
            for kind in ("key", "value")
        )
        gates = None
        if "gate.0" in found:
            gates = np.stack([found[f"gate.{layer}"].reshape(chunk, -1) for layer in layers])
        self._cache.append(key, value, gates, ids.size)
        return found["logits"].reshape(-1)

    def _run(self, chunk: int, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
        graph, border = self._compiled[chunk]
        stored = [np.ascontiguousarray(port.store(inputs[port.name])) for port in border.inputs]
        with _silent():
            given, status = self._reference.run(graph, stored, initialize_variable_tensor_from_numpy=True)
        if status != self._reference.GraphStatus.TOSA_VALID:
            raise StateError(f"the TOSA reference model refuses the graph ({status}): report this")
        return {port.name: port.real(np.asarray(array)) for port, array in zip(border.outputs, given, strict=True)}


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warning about versions that the model's library prints to the standard output in each run."""
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        flush(None)
        os.dup2(nothing, 1)
        yield
        flush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _import_reference() -> Any:
    try:
        import tosa_reference_model
    except ImportError as error:
        raise TrimKVError(
            f"engine tosa needs tosa_reference_model ({error}): pip install --no-deps tosa-tools==2026.5.0"
        ) from error
    return tosa_reference_model
