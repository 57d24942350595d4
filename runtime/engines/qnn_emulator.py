"""The engine of ``npu:hexagon``: graphs compiled for Qualcomm's HTP, in the emulator of onnxruntime-qnn (docs/npu.md).

It computes what the NPU computes; its time says nothing about the NPU's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, TrimKVError
from trimkv_edge.hexagon import find_soc, load_info, shard_role
from trimkv_edge.host_cache import HostCache
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine
from trimkv_edge.runtime.engines.onnx import import_onnxruntime

INSTALL = "pip install 'trimkv-edge[hexagon]' (Qualcomm's libraries in it have a licence of their own, docs/npu.md)"
# Compiled graphs name it.
_PROVIDER = "QNNExecutionProvider"
_TYPES = {"tensor(float)": "float32", "tensor(uint16)": "uint16", "tensor(uint8)": "uint8"}


@cache
def _devices() -> list[Any]:
    """The emulated NPU, as ONNX Runtime lists devices; registered once for the process."""
    ort = import_onnxruntime()
    try:
        import onnxruntime_qnn  # type: ignore
    except ImportError as error:
        raise TrimKVError(f"the qnn-emulator engine needs onnxruntime-qnn ({error}): {INSTALL}") from error
    ort.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER]


def qairt_version() -> str:
    """Version of Qualcomm's compiler and emulator.

    Raises:
        TrimKVError: onnxruntime-qnn is not installed.
    """
    _devices()
    from onnxruntime_qnn import build_and_package_info  # type: ignore

    return str(build_and_package_info.qnn_version)


@contextmanager
def quiet_output() -> Iterator[None]:
    """Keeps what Qualcomm's libraries print while they load off standard output, where a command's text goes."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def htp_options(soc: str) -> Any:
    """Options of a session of ONNX Runtime whose whole graph must run on the HTP of a chip; a session that would leave
    nodes to the CPU fails to open.

    Args:
        soc: a key of :data:`~trimkv_edge.hexagon.SOCS`. The emulator needs it too: without, float graphs are refused.
    """
    chip = find_soc(soc)
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(
        _devices(), {"backend_type": "htp", "soc_model": str(chip.model), "htp_arch": str(chip.arch)}
    )
    return options


class Chain:
    """Parts of one graph, as one session: what a part gives, those after it may take.

    Attributes:
        whole: the last part gives logits.
    """

    def __init__(self, sessions: Sequence[Any]) -> None:
        self._sessions = sessions
        self._reads = [[node.name for node in one.get_inputs()] for one in sessions]
        self._gives = [[node.name for node in one.get_outputs()] for one in sessions]
        self.whole = "logits" in self._gives[-1]

    def get_inputs(self) -> list[Any]:
        """Those that no part gives; once each."""
        given = {name for names in self._gives for name in names}
        found = {node.name: node for one in self._sessions for node in one.get_inputs()}
        return [node for name, node in found.items() if name not in given]

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All that the parts gave, by name."""
        known = dict(feed)
        for session, reads, gives in zip(self._sessions, self._reads, self._gives, strict=True):
            known |= zip(gives, session.run(None, {name: known[name] for name in reads}), strict=True)
        return known

    def profiles(self) -> list[str]:
        """Ends profiling; the parts' files."""
        return [session.end_profiling() for session in self._sessions]


class QnnEmulatorEngine(HostEvictedEngine):
    """Runs the ``npu:hexagon`` target of an artefact from its context binaries, the files that a phone loads.

    Keys and values stay as the graphs take and give them: integers of one scale and zero point, or float32.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: of ONNX Runtime; the emulator does not look at it.

    Raises:
        ConfigError: threads below 1, or settings that a host does not run.
        ArtefactError: a file does not load, or does not fit the manifest.
        TrimKVError: onnxruntime or onnxruntime-qnn is not installed.
    """

    name = "qnn-emulator"
    emulates = True

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        self._target, self._folder = target, folder
        self._info = load_info(self._file("info"))
        super().__init__(folder, manifest, target, threads, profile=profile)

    def _load(self, role: str) -> Any:
        roles = [role]
        while (following := shard_role(role, len(roles))) in self._target.files:
            roles.append(following)
        return Chain([self._open(one) for one in roles])

    def _open(self, role: str) -> Any:
        path = self._file(role)
        self._file(f"{role}_context")
        options = htp_options(self._info.soc)
        if self._scratch:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._scratch.name) / role)
        try:
            with quiet_output():
                return self._ort.InferenceSession(str(path), options)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArtefactError(
                f"{path} does not load in onnxruntime-qnn with QAIRT {qairt_version()} ({reason}): it was made with "
                f"QAIRT {self._info.qairt}; install that version or export it again"
            ) from error

    def _open_cache(self) -> None:
        encodings = self._info.encodings
        dtype = encodings["past.0.key"].dtype if encodings else "float32"
        self._cache = HostCache(
            self.config, self.num_layers, self.num_kv_heads, self.head_dim, dtype=dtype, masked=self._masked
        )
        for chunk in self._sessions:
            self._check_graph(chunk)

    def _check_graph(self, chunk: int) -> None:
        session, path = self._sessions[chunk], self._file("decode" if chunk == 1 else "prefill")
        read = self._feed(np.zeros(1, np.int64), 0, chunk)
        found = {node.name: (node.shape, _TYPES.get(node.type)) for node in session.get_inputs()}
        wanted = {name: (list(array.shape), array.dtype.name) for name, array in read.items()}
        wrong = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        if not session.whole:
            raise ArtefactError(f"{path} and its parts give no logits, so one is missing: export it again")
        if wrong:
            raise ArtefactError(
                f"{path} has {wrong[0]} of shape and type {found.get(wrong[0])}, but the manifest means "
                f"{wanted.get(wrong[0])}: files of two artefacts are mixed, export it again"
            )

    def _feed(self, ids: IntArray, position: int, chunk: int) -> dict[str, npt.NDArray[Any]]:
        rows = self._rows(ids, position, chunk)
        feed: dict[str, npt.NDArray[Any]] = {**rows, **self._past()}
        for name, encoding in self._info.encodings.items():
            if name in rows:
                feed[name] = encoding.store(rows[name])
        return feed

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        chunk = 1 if ids.size == 1 else self.config.prefill_chunk
        out = self._sessions[chunk].run(self._feed(ids, position, chunk))
        layers = range(self.num_layers)
        key, value = (np.concatenate([out[f"new.{layer}.{kind}"] for layer in layers]) for kind in ("key", "value"))
        gates = None
        if "gate.0" in out:
            gates = np.concatenate([self._real(f"gate.{layer}", out[f"gate.{layer}"]) for layer in layers])
        self._cache.append(key, value, gates, ids.size)
        logits: FloatArray = self._real("logits", out["logits"])[0, 0]
        return logits

    def _profiles(self) -> list[str]:
        return [file for chain in self._sessions.values() for file in chain.profiles()]

    def _real(self, name: str, stored: npt.NDArray[Any]) -> FloatArray:
        encoding = self._info.encodings.get(name)
        return stored if encoding is None else encoding.real(stored)

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        key, value = (
            np.stack([self._real(f"past.{layer}.{kind}", rows) for layer, rows in enumerate(table)])
            for kind, table in (("key", self._cache.key), ("value", self._cache.value))
        )
        return key, value, self._cache.log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        encodings = self._info.encodings
        if encodings:
            key, value = (
                np.stack([encodings[f"past.{layer}.{kind}"].store(rows) for layer, rows in enumerate(table)])
                for kind, table in (("key", key), ("value", value))
            )
        self._cache.load(key, value, log_beta, kept, seen, live)
