"""The ExecuTorch engine. ExecuTorch's Python binding takes and gives torch tensors; both are imported on first use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, ConfigError, StateError, TrimKVError
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.gate_rows import GateRows
from trimkv_edge.runtime.profile import OperatorTime, read_etdump

_METHODS = ("forward", "evict", "reset", "read_kept", "write_kept", "read_state", "write_state")
# Kernels beyond the binding's own: an operator, the package that holds the library, its file.
_KERNELS = (
    ("llama::custom_sdpa.out", "executorch.extension.llm.custom_ops", "*custom_ops_aot_lib.*"),
    ("quantized_decomposed::embedding_byte.out", "executorch.kernels.quantized", "*quantized_ops_aot_lib.*"),
)
# Only of models with gates.
_GATES = "gates"
# Only where heads share a budget.
_SHARED_BUDGET = ("read_lengths", "write_lengths")


class ExecuTorchProgram(ArtefactEngine):
    """Loads a program of either kind and runs its methods.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: size of ExecuTorch's thread pool and of torch's, in which some of its kernels run; there is one of each
            in a process. Default: as they are.

    Raises:
        ConfigError: threads below 1, or a pool that does not take the size.
        ArtefactError: the program does not load, or does not fit the manifest.
        TrimKVError: executorch or torch is not installed.
    """

    name = "executorch"

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        super().__init__(folder, manifest, target, threads, profile=profile)
        path = self._file("program")
        with native_log() as log:
            self._torch, self._binding = _import_executorch(kernels=target.ops == "xnnpack")
            if threads is not None:
                _set_threads(self._torch, self._binding, threads)
            self.threads = self._binding._threadpool_get_thread_count()
            self._methods = self._load(path, log)
        self._position, self._live, self._seen, self._slot = (np.zeros(1, np.int64) for _ in range(4))
        self._token = np.zeros((1, 1), np.int64)
        # These share the arrays' memory: a decode step makes no tensor.
        shared = [self._torch.from_numpy(array) for array in (self._position, self._live, self._token, self._seen)]
        self._chunk_inputs, self._decode_inputs, self._evict_inputs = shared[:2], (shared[2], *shared[:2]), (shared[3],)
        self._gate_rows = GateRows(self.num_layers, manifest.model.hidden_size, self.config)
        rows = self._torch.from_numpy(self._gate_rows.rows)
        self._gate_inputs = (self._torch.from_numpy(self._slot), *rows.split(1))
        self._block = self._run("read_state", (shared[3],))[2].numel() // self._rows
        self._reset()

    @property
    def _rows(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def _wanted(self) -> tuple[str, ...]:
        """Methods that this kind of program has."""
        return (*_METHODS, _GATES) if self._gated else _METHODS

    @property
    def _gated(self) -> bool:
        return self._manifest.gates.kind != "none"

    def _load(self, path: Path, log: IO[bytes]) -> dict[str, Any]:
        """All methods now: loading one later would initialise buffers of those that have run."""
        try:
            self._program = self._binding._load_program(
                str(path),
                enable_etdump=self._profiled,
                program_verification=self._binding.Verification.InternalConsistency,
            )
            names = {self._program.get_method_name(index) for index in range(self._program.num_methods())}
            missing = [name for name in self._wanted if name not in names]
            if missing:
                raise ArtefactError(f"{path} has no method {missing[0]}: export it again with this version")
            if names & set(_SHARED_BUDGET) - set(self._wanted):
                raise ArtefactError(
                    f"{path} has a budget that heads share, but the manifest means one for each head: "
                    "files of two artefacts are mixed, export it again"
                )
            if _GATES in names and not self._gated:
                raise ArtefactError(
                    f"{path} has gates, but the manifest means none: files of two artefacts are mixed, export it again"
                )
            if "embed" in names and "embed" not in self._wanted:
                raise ArtefactError(
                    f"{path} is of a model that reads pictures, but the manifest means a text model: "
                    "files of two artefacts are mixed, export it again"
                )
            self._check_constants(path)
            return {name: self._program.load_method(name) for name in self._wanted}
        except RuntimeError as error:
            raise does_not_load(path, log, error) from error

    def _facts(self) -> dict[str, Any]:
        """Constant methods and what the manifest means them to be."""
        config = self.config
        return {
            "get_vocab_size": self.vocab_size,
            "get_n_layers": self.num_layers,
            "get_n_kv_heads": self.num_kv_heads,
            "get_head_dim": self.head_dim,
            "get_trimkv_budget": config.budget,
            "get_trimkv_buffer": config.buffer,
            "get_trimkv_prefill_chunk": config.prefill_chunk,
            "get_trimkv_sinks": config.sinks,
            "get_trimkv_recent": config.recent,
            **(self._waiting_facts() if self._gated else {}),
        }

    def _waiting_facts(self) -> dict[str, Any]:
        """Of what gates have yet to read."""
        return {
            "get_trimkv_gate_rows": self.config.gate_rows,
            "get_trimkv_hidden_size": self._manifest.model.hidden_size,
        }

    def _check_constants(self, path: Path) -> None:
        for name, want in self._facts().items():
            values = self._program.load_method(name).call(())
            found = values if isinstance(want, list) else values[0]
            if found != want:
                raise ArtefactError(
                    f"{path} says {name} = {found}, but the manifest means {want}: "
                    "files of two artefacts are mixed, export it again"
                )

    def _run(self, name: str, inputs: tuple[Any, ...] = ()) -> list[Any]:
        """Outputs lie in the program's own memory, until its next call."""
        try:
            outputs: list[Any] = self._methods[name].call(inputs, clone_outputs=False)
        except RuntimeError as error:
            # A step writes free slots only, so what counts as live is as it was.
            raise StateError(
                f"ExecuTorch failed in {name} ({error}): the step was not counted, repeat it or reset"
            ) from error
        return outputs

    def _read_profile(self) -> list[OperatorTime]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "etdump"
            self._program.write_etdump_result_to_file(str(path))
            return read_etdump(path)

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        self._position[0], self._live[0] = position, live
        if ids.size == 1:
            self._token[0, 0] = ids[0]
            inputs = self._decode_inputs
        else:
            inputs = (self._torch.from_numpy(ids).unsqueeze(0), *self._chunk_inputs)
        return self._run_step(inputs, ids.size)

    def _run_step(self, inputs: tuple[Any, ...], count: int) -> FloatArray:
        """Runs ``forward`` over a chunk of ``count`` tokens; what gates read of it waits."""
        rows = self._gate_rows
        if rows.due(count):
            self.settle()
        output, *read = self._run("forward", inputs)
        logits: FloatArray = output.numpy().reshape(-1).copy()
        if read:
            part = slice(rows.waiting, rows.waiting + count)
            # Not torch's cat, which takes three times as long in the middle of a stream.
            for waiting, new in zip(rows.rows, read, strict=True):
                waiting[part] = new.numpy()[0]
            rows.waiting += count
        return logits

    def settle(self) -> None:
        count = self._gate_rows.waiting
        if count:
            self._slot[0] = self.live - count
            slot, *rows = self._gate_inputs
            self._run(_GATES, (slot, *(row[:, :count] for row in rows)))
            self._gate_rows.waiting = 0

    def _reset(self) -> None:
        self._run("reset")
        self._gate_rows.waiting = 0

    def _kept_positions(self) -> IntArray:
        kept: IntArray = self._run("read_kept")[0].numpy()
        return kept.reshape(self.num_layers, self.num_kv_heads, -1).copy()


class ExecuTorchEngine(ExecuTorchProgram):
    """Runs the ``executorch`` target of an artefact whose heads have a budget each; arguments as for its base."""

    def _evict(self, seen: int) -> None:
        self.settle()
        self._seen[0] = seen
        self._run("evict", self._evict_inputs)

    def _blocks(self) -> list[int]:
        """First slots of the blocks that cover the cache; the last may overlap the one before."""
        last = self.config.slots - self._block
        return [*range(0, last, self._block), last]

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        self.settle()
        shape, block = (self.num_layers, self.num_kv_heads, self.config.slots), self._block
        key, value = (np.empty((*shape, self.head_dim), np.float32) for _ in range(2))
        log_beta = np.empty(shape, np.float32)
        for start in self._blocks():
            part = slice(start, start + block)
            self._seen[0] = start
            outputs = [output.numpy() for output in self._run("read_state", self._evict_inputs)]
            for whole, rows in zip((key, value), outputs, strict=False):
                by_slot = rows.reshape(self.num_layers, block, self.num_kv_heads, self.head_dim)
                whole[:, :, part] = by_slot.transpose(0, 2, 1, 3)
            log_beta[:, :, part] = outputs[2].reshape(block, *shape[:2]).transpose(1, 2, 0)
        return key, value, log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        tensor, layers = self._torch.from_numpy, self.num_layers
        for start in (start for start in self._blocks() if start < live):
            part = slice(start, start + self._block)
            by_slot = np.zeros((self._block, layers, self.num_kv_heads), np.float32)
            rows = [np.zeros((layers, self._block, self.num_kv_heads, self.head_dim), np.float32) for _ in range(2)]
            count = min(live - start, self._block)
            for made, whole in zip(rows, (key, value), strict=True):
                made[:, :count] = whole[:, :, part].transpose(0, 2, 1, 3)
            by_slot[:count] = log_beta[:, :, part].transpose(2, 0, 1)
            self._seen[0] = start
            inputs = (*(array.reshape(layers, -1, self.head_dim) for array in rows), by_slot.reshape(-1, 1))
            self._run("write_state", (*self._evict_inputs, *map(tensor, inputs)))
        self._run("write_kept", (tensor(np.ascontiguousarray(kept).reshape(self._rows, -1)),))
        self._gate_rows.waiting = 0


@contextmanager
def native_log() -> Iterator[IO[bytes]]:
    """What ExecuTorch's C++ side prints on standard error while it loads (CPU probing, reasons of a failure)."""
    with tempfile.TemporaryFile() as log:
        try:
            saved = os.dup(2)
        except OSError:  # no standard error at all
            yield log
            return
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def does_not_load(path: Path, log: IO[bytes], error: RuntimeError) -> ArtefactError:
    """What to tell of a program, with what :func:`native_log` heard."""
    log.seek(0)
    lines = [*log.read().decode(errors="replace").splitlines(), str(error).splitlines()[0]]
    reason = "; ".join(line for line in lines if "cpuinfo" not in line and line.strip())
    return ArtefactError(
        f"{path} does not load in ExecuTorch ({reason}): copy the whole folder again or export it again"
    )


def _import_executorch(kernels: bool) -> tuple[ModuleType, ModuleType]:
    """torch and ExecuTorch's binding, with the libraries of ``_KERNELS`` if ``kernels``.

    The public wrapper, ``executorch.runtime``, would import the whole compiler.
    """
    try:
        import torch
        from executorch.extension.pybindings import _C as binding

        for operator, package, pattern in _KERNELS if kernels else ():
            if operator not in binding._get_operator_names():
                (library,) = Path(import_module(package).__path__[0]).glob(pattern)
                torch.ops.load_library(library)
    except (ImportError, ValueError) as error:
        raise TrimKVError(
            f"the executorch engine needs executorch and torch ({error}): pip install 'trimkv-edge[executorch]'"
        ) from error
    return torch, binding


def _set_threads(torch: ModuleType, binding: ModuleType, threads: int) -> None:
    torch.set_num_threads(threads)
    binding._unsafe_reset_threadpool(threads)
    actual = binding._threadpool_get_thread_count()
    if actual != threads:
        raise ConfigError(f"threads is {threads}, but ExecuTorch's thread pool has {actual}: leave --threads out")
