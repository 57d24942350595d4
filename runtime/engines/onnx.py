"""The ONNX Runtime engine: numpy and onnxruntime only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from trimkv_edge.bfloat16 import from_bfloat16, to_bfloat16
from trimkv_edge.budget import held_as_float32
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, TrimKVError, first_line
from trimkv_edge.kv_scales import KVScales, from_int8, load_scales, to_int8
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.engines.gate_rows import GateRows
from trimkv_edge.runtime.mapped import release_mapped
from trimkv_edge.runtime.profile import OperatorTime, read_onnxruntime

# Where graphs run; runtime/engines/onnx_cuda.py has the other place.
PROVIDERS = ("CPUExecutionProvider",)
_PROFILED = ("decoder", "gates")
_NO_BLOCKS = "ORT_GQA_DISABLE_FLASH_ATTENTION"

# Names of ONNX Runtime. numpy has no bfloat16: its 16 bits are integers there.
_TYPES = {"float32": "float", "uint16": "bfloat16"}

Array = npt.NDArray[Any]


@contextmanager
def _plain_attention(wanted: bool) -> Iterator[None]:
    """While open, sessions that are made attend without blocks of keys.

    Over an int8 cache ONNX Runtime's plain form takes a fifth less time for one token (32 x 96 heads, 1,088 entries:
    387 against 485 us). It has no option for it but this variable, which it reads when a session is made.
    """
    if not wanted or _NO_BLOCKS in os.environ:
        yield
        return
    os.environ[_NO_BLOCKS] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_BLOCKS]


class OnnxEngine(ArtefactEngine):
    """Runs the ``onnx`` target of an artefact.

    Every state tensor is one buffer, bound as ``past.X`` and ``present.X`` of all graphs, so a step and an event write
    in place. A decode step reuses one prepared binding. Gates that have a graph of their own read before an event.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: threads within an operator; default: the physical cores this process may use.
        aliased: False keeps two buffers per state tensor and swaps them; for tests, it copies the cache every step.

    Raises:
        ConfigError: threads below 1.
        ArtefactError: a graph does not load, or does not fit the manifest.
        TrimKVError: onnxruntime is not installed.
    """

    name = "onnx"
    shares_model = True  # any thread may run a session

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: Target,
        threads: int | None = None,
        *,
        profile: bool = False,
        aliased: bool = True,
    ) -> None:
        super().__init__(folder, manifest, target, threads, profile=profile)
        self._scratch = tempfile.TemporaryDirectory(prefix="trimkv-profile-") if profile else None
        self._ort = import_onnxruntime()
        self._check_floats()
        self._aliased = aliased
        self.threads = threads or physical_cores()
        self._decoder = self._load("decoder", self.threads)
        self._evictor = self._load("evict", self.threads)
        self._gates = self._load("gates", self.threads) if "gates" in target.files else None
        release_mapped(folder)
        self._scales = self._load_scales()
        self._open_cache()
        self._check_inputs(self._file("decoder"), self._decoder, self._decoder_state())
        self._check_inputs(self._file("evict"), self._evictor, self._evict_state())
        if self._gates:
            self._check_inputs(self._file("gates"), self._gates, ["log_beta"])

    def _check_floats(self) -> None:
        if self.config.kv_dtype == "bfloat16":
            raise ArtefactError(
                f"{self._folder} computes in bfloat16, for which onnxruntime has no kernels on a CPU: use --engine "
                "onnx:cuda, or export with --quant fp16 or none"
            )

    def _open_cache(self) -> None:
        """All that belongs to one stream."""
        self._position, self._live_length, self._seen = self._numbers()
        self._arrays = self._allocate()
        self._spare = {} if self._aliased else self._allocate()
        self._logits = np.zeros((1, 1, self.vocab_size), np.float32)
        self._chunks: dict[int, Array] = {}
        self._bindings: dict[int, Any] = {}
        self._gate_bindings: dict[int, Any] = {}
        self._gate_rows: GateRows | None = None
        if self._gates:
            self._gate_rows = GateRows(self.num_layers, self._manifest.model.hidden_size, self.config)
            self._gate_row = self._gate_rows.rows[:, :1].copy()  # of a step of one token
        self._reset()

    def _numbers(self) -> tuple[Array, Array, Array]:
        """Where the position, the live length and the tokens seen are put, int64 ``[1]`` each."""
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)

    def _allocate(self) -> dict[str, Array]:
        """All state tensors, zeroed."""
        rows, slots = self.num_layers * self.num_kv_heads, self.config.slots
        shape = (1, self.num_kv_heads, slots, self.head_dim)
        stored = np.uint16 if self.config.kv_dtype == "bfloat16" else np.dtype(self.config.kv_dtype)
        arrays: dict[str, Array] = {name: np.zeros(shape, stored) for name in self._caches()}
        arrays["log_beta"] = np.zeros((slots, rows), np.float32)
        arrays["positions"] = np.zeros((rows, self.config.budget), np.int64)
        return arrays

    def _read_profile(self) -> list[OperatorTime]:
        sessions = [self._decoder, *([self._gates] if self._gates else [])]
        return read_onnxruntime(*(Path(session.end_profiling()) for session in sessions))

    def _load_scales(self) -> KVScales | None:
        if self.config.kv_dtype != "int8":
            return None
        return load_scales(self._file("kv_scales"), (self.num_layers, self.num_kv_heads, self.head_dim))

    def _caches(self) -> list[str]:
        """Names of the key and value tensors that the evict graph sees."""
        return [f"{layer}.{kind}" for layer in range(self.num_layers) for kind in ("key", "value")]

    def _decoder_caches(self) -> list[str]:
        """The same that the decoder sees."""
        return self._caches()

    def _decoder_state(self) -> list[str]:
        """State tensors of the decoder, which writes all of them in every step."""
        return [*self._decoder_caches(), *([] if self._gates else ["log_beta"])]

    def _evict_state(self) -> list[str]:
        return [*self._caches(), "log_beta", "positions"]

    def _live_inputs(self) -> dict[str, Array]:
        """Numbers that tell what is live."""
        return {"live_length": self._live_length}

    def _decoder_inputs(self) -> dict[str, Array]:
        """What the decoder reads beside tokens and state."""
        return {"position": self._position, **self._live_inputs()}

    def _evict_inputs(self) -> dict[str, Array]:
        return {"seen": self._seen}

    def _load(self, role: str, threads: int) -> Any:
        path, options = self._file(role), self._session_options(role, threads)
        with _plain_attention(self.config.kv_dtype == "int8"):
            return open_session(self._ort, path, options, self._providers(role))

    def _session_options(self, role: str, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Patterns are kept per chunk length, so mixed lengths would make memory grow.
        options.enable_mem_pattern = False
        if self._scratch and role in _PROFILED:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._scratch.name) / role)
        if self._narrow:
            # Products are float32. Each matrix is turned just before its product and forgotten, 0.4 s for a billion
            # numbers on two cores; ONNX Runtime would turn all of them when it loads, or at the start of each step.
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.execution_order = self._ort.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = False
            if self._manifest.dtype == "bfloat16":
                # Those graphs turn matrices themselves: ONNX Runtime would do it ahead, or in another order.
                options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if role == "evict":
            # It runs once per buffer: its idle threads must not compete with the decoder's.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    @property
    def _narrow(self) -> bool:
        """Whether weights are narrower floats than what the processor multiplies, and stay so."""
        dtype, weights = self._manifest.dtype, self._manifest.bytes.weights
        return dtype in ("float16", "bfloat16") and not held_as_float32(dtype, weights)

    def _providers(self, role: str) -> Sequence[Any]:
        """Where a graph runs, as onnxruntime takes it."""
        return PROVIDERS

    def _check_inputs(self, path: Path, session: Any, names: list[str]) -> None:
        found = {node.name: (node.shape, node.type) for node in session.get_inputs()}
        for name in names:
            array = self._arrays[name]
            want = (list(array.shape), f"tensor({_TYPES.get(array.dtype.name, array.dtype.name)})")
            have = found.get(f"past.{name}")
            if have != want:
                raise ArtefactError(
                    f"{path} has input past.{name} of shape and type {have}, but the manifest means {want}: "
                    "files of two artefacts are mixed, export it again"
                )

    def _bind(self, session: Any, plain: dict[str, Array], state: list[str]) -> Any:
        """A binding of ``plain`` inputs and of the state tensors, in place unless the engine is a copying one."""
        binding = session.io_binding()
        for name, array in plain.items():
            self._attach(binding, name, array)
        for name in state:
            self._attach(binding, f"past.{name}", self._arrays[name])
            present = self._arrays if self._aliased else self._spare
            self._attach(binding, f"present.{name}", present[name], output=True)
        return binding

    def _attach(self, binding: Any, name: str, array: Array, *, output: bool = False) -> None:
        """Binds a graph's input or output to the memory of ``array``."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)  # shares it
        (binding.bind_ortvalue_output if output else binding.bind_ortvalue_input)(name, value)

    def _chunk(self, count: int) -> Array:
        """Where ids of a chunk are put, int64 ``[1, count]``."""
        return np.zeros((1, count), np.int64)

    def _decoder_binding(self, count: int) -> Any:
        chunk = self._chunks.setdefault(count, self._chunk(count))
        plain = {"input_ids": chunk, **self._decoder_inputs()}
        return self._bind_decoder(plain, count)

    def _bind_decoder(self, plain: dict[str, Array], count: int) -> Any:
        binding = self._bind(self._decoder, plain, self._decoder_state())
        self._attach(binding, "logits", self._logits, output=True)
        if self._gate_rows:
            rows = self._gate_row if count == 1 else self._gate_rows.rows[:, :count]
            for layer in range(self.num_layers):
                self._attach(binding, f"gate_input.{layer}", rows[layer : layer + 1], output=True)
        return binding

    def _gate_binding(self, count: int) -> Any:
        """Binding for the gates to read the first ``count`` rows."""
        binding = self._gate_bindings.get(count)
        if binding is None:
            assert self._gate_rows
            rows = self._gate_rows.rows[:, :count]
            plain = {f"gate_input.{layer}": rows[layer : layer + 1] for layer in range(self.num_layers)}
            binding = self._bind(self._gates, {**plain, **self._live_inputs()}, ["log_beta"])
            if self._aliased:
                self._gate_bindings[count] = binding
        return binding

    def _binding(self, count: int) -> Any:
        """Binding for chunks of ``count`` tokens; 0 is the event."""
        binding = self._bindings.get(count)
        if binding is None:
            if count:
                binding = self._decoder_binding(count)
            else:
                binding = self._bind(self._evictor, self._evict_inputs(), self._evict_state())
            if self._aliased:
                self._bindings[count] = binding
        return binding

    def _swap(self, names: list[str]) -> None:
        if not self._aliased:
            for name in names:
                self._arrays[name], self._spare[name] = self._spare[name], self._arrays[name]

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        binding = self._binding(ids.size)
        self._chunks[ids.size][0] = ids
        return self._run_step(binding, ids.size, position, live)

    def _run_step(self, binding: Any, count: int, position: int, live: int) -> FloatArray:
        """Runs the decoder over a chunk that lies in its place; returns the last token's logits."""
        if self._gate_rows and self._gate_rows.due(count):
            self._settle(live)
        self._position[0], self._live_length[0] = position, live
        self._run(self._decoder, binding, count)
        self._swap(self._decoder_state())
        if self._gate_rows:
            self._keep(self._gate_rows, count, live)
        return self._last_logits()

    def _keep(self, rows: GateRows, count: int, live: int) -> None:
        """Puts what the decoder gave with a chunk to the rows that wait."""
        if count == 1:
            rows.rows[:, rows.waiting] = self._gate_row[:, 0]
        rows.waiting += count

    def settle(self) -> None:
        self._settle(self.live)

    def _settle(self, live: int) -> None:
        """Lets the gates read the rows that wait, those of the newest of ``live`` entries."""
        if not self._gate_rows or not self._gate_rows.waiting:
            return
        count = self._gate_rows.waiting
        self._live_length[0] = live - count
        self._run(self._gates, self._gate_binding(count))
        self._swap(["log_beta"])
        self._gate_rows.waiting = 0

    def _run(self, session: Any, binding: Any, count: int = 0) -> None:
        """Runs a graph; of the decoder ``count`` is T."""
        session.run_with_iobinding(binding)

    def _last_logits(self) -> FloatArray:
        logits: FloatArray = self._logits[0, 0].copy()
        return logits

    def _evict(self, seen: int) -> None:
        self.settle()
        self._seen[0], self._live_length[0] = seen, self.live
        self._run(self._evictor, self._binding(0))
        self._swap(self._evict_state())

    def _reset(self) -> None:
        self._forget_rows()
        for array in self._arrays.values():
            array.fill(0)
        self._arrays["positions"][:] = np.arange(self.config.budget)

    def _forget_rows(self) -> None:
        if self._gate_rows:
            self._gate_rows.waiting = 0

    def _kept_positions(self) -> IntArray:
        return self._arrays["positions"].reshape(self.num_layers, self.num_kv_heads, -1).copy()

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        self.settle()
        key, value = (
            np.concatenate([self._arrays[f"{layer}.{kind}"] for layer in range(self.num_layers)])
            for kind in ("key", "value")
        )
        if self._scales:
            key, value = from_int8(key, self._scales.key), from_int8(value, self._scales.value)
        if self.config.kv_dtype == "bfloat16":
            key, value = from_bfloat16(key), from_bfloat16(value)
        key, value = key.astype(np.float32, copy=False), value.astype(np.float32, copy=False)
        by_slot = self._arrays["log_beta"].reshape(-1, self.num_layers, self.num_kv_heads)
        return key, value, by_slot.transpose(1, 2, 0)

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self._forget_rows()
        rows: tuple[Array, Array] = (key, value)
        if self._scales:
            rows = to_int8(key, self._scales.key), to_int8(value, self._scales.value)
        elif self.config.kv_dtype == "bfloat16":
            rows = to_bfloat16(key), to_bfloat16(value)
        for layer in range(self.num_layers):
            self._arrays[f"{layer}.key"][0][:, :live] = rows[0][layer]
            self._arrays[f"{layer}.value"][0][:, :live] = rows[1][layer]
        self._arrays["log_beta"][:live] = log_beta.transpose(2, 0, 1).reshape(live, -1)
        self._arrays["positions"][:] = kept.reshape(-1, self.config.budget)


def open_session(ort: Any, path: Path, options: Any, providers: Sequence[Any] = PROVIDERS) -> Any:
    """``ort.InferenceSession`` of a graph; raises :class:`ArtefactError` if it does not load."""
    try:
        # Without it onnxruntime tries other providers itself, and says so on stdout.
        return ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise ArtefactError(
            f"{path} does not load in onnxruntime {ort.__version__} ({first_line(error)}): "
            "copy the whole folder again or export it again"
        ) from error


def import_onnxruntime() -> Any:
    """The module; raises :class:`TrimKVError` with the remedy if it is not installed."""
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise TrimKVError(f"the onnx engine needs onnxruntime ({error}): pip install 'trimkv-edge[onnx]'") from error
    return onnxruntime


def physical_cores() -> int:
    """Cores that this process may use, two threads of one counted once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))
