"""The engine of LiteRT: its interpreter, driven by the numpy host (docs/npu.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, ConfigError, TrimKVError
from trimkv_edge.host_cache import HostCache
from trimkv_edge.host_constants import load_constants
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine, _check
from trimkv_edge.runtime.engines.onnx import physical_cores


class LiteRTEngine(HostEvictedEngine):
    """Runs the ``litert`` target of an artefact. The interpreter copies the cache in; only new rows come out.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: threads of the interpreter; default: the physical cores this process may use.

    Raises:
        ConfigError: threads below 1, a profile, or settings that a host does not run.
        ArtefactError: a file does not load, or does not fit the manifest.
        TrimKVError: ai-edge-litert is not installed.
    """

    name = "litert"
    shares_model = False  # an interpreter holds the tensors of one run

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        ArtefactEngine.__init__(self, folder, manifest, target, threads)
        if profile:
            raise ConfigError("engine litert does not note the time of operators: leave out --profile")
        self.threads = threads or physical_cores()
        constants = load_constants(self._file("constants"))
        self._rotary, self._masked = constants.rotary, constants.masked
        self._embedding = self._load_embedding(manifest.model.hidden_size)
        self._open_cache()
        self._interpreter = self._open(self._file("program"))
        names = {1: "decode"} | ({self.config.prefill_chunk: "prefill"} if self.config.prefill_chunk > 1 else {})
        self._runners = {chunk: self._runner(name, chunk) for chunk, name in names.items()}

    def _open_cache(self) -> None:
        self._cache = HostCache(self.config, self.num_layers, self.num_kv_heads, self.head_dim, masked=self._masked)

    def _open(self, path: Path) -> Any:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise TrimKVError(
                f"engine litert needs ai-edge-litert ({error}): pip install 'trimkv-edge[litert]'"
            ) from error
        try:
            return Interpreter(str(path), num_threads=self.threads)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtefactError(
                f"{path} does not load in LiteRT ({reason}): copy the whole folder again or export it again"
            ) from error

    def _runner(self, name: str, chunk: int) -> Any:
        path = self._file("program")
        try:
            runner = self._interpreter.get_signature_runner(name)
        except ValueError as error:
            raise ArtefactError(f"{path} has no signature {name}: export the artefact again") from error
        found = {key: detail["shape"].tolist() for key, detail in runner.get_input_details().items()}
        _check(path, found, self._inputs(np.zeros(1, np.int64), 0, chunk))
        return runner

    def _inputs(self, ids: IntArray, position: int, chunk: int) -> dict[str, FloatArray]:
        """What a graph for ``chunk`` tokens reads, by its names."""
        inputs = self._rows(ids, position, chunk)
        for layer in range(self.num_layers):
            inputs[f"past_{layer}_key"] = self._cache.key[layer : layer + 1]
            inputs[f"past_{layer}_value"] = self._cache.value[layer : layer + 1]
        return inputs

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        chunk = 1 if ids.size == 1 else self.config.prefill_chunk
        found = self._runners[chunk](**self._inputs(ids, position, chunk))
        layers = range(self.num_layers)
        key, value = (np.concatenate([found[f"new_{layer}_{kind}"] for layer in layers]) for kind in ("key", "value"))
        gates = np.concatenate([found[f"gate_{layer}"] for layer in layers]) if "gate_0" in found else None
        self._cache.append(key, value, gates, ids.size)
        logits: FloatArray = found["logits"][0, 0]
        return logits
