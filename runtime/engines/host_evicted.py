"""The engine of host-evicted graphs on ONNX Runtime: a numpy host around static graphs, as on an NPU (docs/npu.md)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError
from trimkv_edge.host_cache import HostCache, padded
from trimkv_edge.host_constants import load_constants
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.onnx import import_onnxruntime, open_session, physical_cores
from trimkv_edge.runtime.profile import OperatorTime, read_onnxruntime

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Graph:
    """A session for ``chunk`` tokens, bound to the arrays of one stream."""

    chunk: int
    session: Any
    binding: Any
    inputs: dict[str, FloatArray]
    logits: FloatArray
    key: FloatArray
    value: FloatArray
    gates: FloatArray | None


class HostEvictedEngine(ArtefactEngine):
    """Runs the ``host-evicted`` target of an artefact.

    Graphs read the cache's own arrays and write only the chunk's rows; one token takes the graph for one, more the
    graph for a prefill chunk, padded.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: threads within an operator; default: the physical cores this process may use.

    Raises:
        ConfigError: threads below 1, or settings that a host does not run.
        ArtefactError: a file does not load, or does not fit the manifest.
        TrimKVError: onnxruntime is not installed.
    """

    name = "host-evicted"
    shares_model = True

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        super().__init__(folder, manifest, target, threads, profile=profile)
        self._scratch = tempfile.TemporaryDirectory(prefix="trimkv-profile-") if profile else None
        self._ort = import_onnxruntime()
        self.threads = threads or physical_cores()
        constants = load_constants(self._file("constants"))
        self._rotary = constants.rotary
        self._embedding = self._load_embedding(manifest.model.hidden_size)
        self._masked = constants.masked
        self._sessions = {1: self._load("decode")}
        if self.config.prefill_chunk > 1:
            self._sessions[self.config.prefill_chunk] = self._load("prefill")
        self._open_cache()

    def _open_cache(self) -> None:
        """All that belongs to one stream."""
        self._cache = HostCache(self.config, self.num_layers, self.num_kv_heads, self.head_dim, masked=self._masked)
        self._graphs = {chunk: self._bind(chunk) for chunk in self._sessions}

    def _load_embedding(self, width: int) -> FloatArray:
        path, shape = self._file("embedding"), (self.vocab_size, width)
        if path.stat().st_size != 4 * self.vocab_size * width:
            raise ArtefactError(
                f"{path} has {path.stat().st_size} bytes, but float32 rows of {shape} have {4 * shape[0] * shape[1]}: "
                "copy the whole folder again or export it again"
            )
        return np.memmap(path, "<f4", "r", shape=shape)

    def _load(self, role: str) -> Any:
        self._file("weights")
        ort, path = self._ort, self._file(role)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Both graphs map one file of weights. Packed copies of it would be two more: 76 million parameters then take
        # 484 MiB more of private memory, for a token in 7.9 instead of 8.5 ms.
        options.add_session_config_entry("session.disable_prepacking", "1")
        if self._scratch:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._scratch.name) / role)
        return open_session(ort, path, options)

    def _bind(self, chunk: int) -> _Graph:
        session, path = self._sessions[chunk], self._file("decode" if chunk == 1 else "prefill")
        layers, heads, cache = self.num_layers, self.num_kv_heads, self._cache
        angles = (1, chunk, 2 * self._rotary.inverse_frequencies.size)
        shapes = {
            "hidden": (1, chunk, self._embedding.shape[1]),
            "cos": angles,
            "sin": angles,
            "mask": (1, 1, chunk, self.config.slots + chunk),
        }
        inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        outputs = {node.name: node.shape for node in session.get_outputs()}
        logits = np.zeros((1, 1, self.vocab_size), np.float32)
        key, value = (np.zeros((layers, heads, chunk, self.head_dim), np.float32) for _ in range(2))
        gates = np.zeros((layers, chunk, heads), np.float32) if "gate.0" in outputs else None
        read, written = dict(inputs), {"logits": logits}
        for layer in range(layers):  # views of one layer, whose memory the graph reads and writes
            for kind, slots, rows in (("key", cache.key, key), ("value", cache.value, value)):
                read[f"past.{layer}.{kind}"] = slots[layer : layer + 1]
                written[f"new.{layer}.{kind}"] = rows[layer : layer + 1]
            if gates is not None:
                written[f"gate.{layer}"] = gates[layer : layer + 1]
        _check(path, {node.name: node.shape for node in session.get_inputs()}, read)
        _check(path, outputs, written)
        share, binding = self._ort.OrtValue.ortvalue_from_numpy, session.io_binding()
        for name, array in read.items():
            binding.bind_ortvalue_input(name, share(array))
        for name, array in written.items():
            binding.bind_ortvalue_output(name, share(array))
        return _Graph(chunk, session, binding, inputs, logits, key, value, gates)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        graph = self._graphs[1 if ids.size == 1 else self.config.prefill_chunk]
        for name, rows in self._rows(ids, position, graph.chunk).items():
            graph.inputs[name][:] = rows
        graph.session.run_with_iobinding(graph.binding)
        self._cache.append(graph.key, graph.value, graph.gates, ids.size)
        logits: FloatArray = graph.logits[0, 0].copy()
        return logits

    def _rows(self, ids: IntArray, position: int, chunk: int) -> dict[str, FloatArray]:
        """What a graph for ``chunk`` tokens reads beside the cache."""
        which = padded(ids.size, chunk)
        cos, sin = self._rotary.rows(position + which)
        return {
            "hidden": self._embedding[ids[which]][None],
            "cos": cos,
            "sin": sin,
            "mask": self._cache.mask(ids.size, chunk),
        }

    def _past(self) -> dict[str, Array]:
        """The cache's own rows, by the names of the graphs' inputs."""
        tables = {"key": self._cache.key, "value": self._cache.value}
        return {
            f"past.{layer}.{kind}": table[layer : layer + 1]
            for layer in range(self.num_layers)
            for kind, table in tables.items()
        }

    def _evict(self, seen: int) -> None:
        self._cache.evict()

    def _reset(self) -> None:
        self._cache.reset()

    def _kept_positions(self) -> IntArray:
        return self._cache.positions[..., : self.config.budget].copy()

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return self._cache.key, self._cache.value, self._cache.log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self._cache.load(key, value, log_beta, kept, seen, live)

    def _profiles(self) -> list[str]:
        return [session.end_profiling() for session in self._sessions.values()]

    def _read_profile(self) -> list[OperatorTime]:
        found: dict[str, OperatorTime] = {}
        for row in (row for file in self._profiles() for row in read_onnxruntime(Path(file))):
            before = found.get(row.operator, OperatorTime(row.operator, 0, 0.0))
            found[row.operator] = OperatorTime(row.operator, before.calls + row.calls, before.seconds + row.seconds)
        return sorted(found.values(), key=lambda row: -row.seconds)


def _check(path: Path, found: dict[str, Any], wanted: dict[str, FloatArray]) -> None:
    for name, array in wanted.items():
        if found.get(name) != list(array.shape):
            raise ArtefactError(
                f"{path} has {name} of shape {found.get(name)}, but the manifest means {list(array.shape)}: "
                "files of two artefacts are mixed, export it again"
            )
