"""The ONNX Runtime engine on CUDA: the cache stays on the device; a step copies its tokens in and its logits out.

It has not run on a GPU yet. With ``device="cpu"`` the same code runs on the CPU, which is how it is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count as counter
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_edge.budget import format_bytes
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError, BudgetError, ConfigError, TrimKVError, first_line
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.engines.cuda_check import CUDA, failure, require_device, why_not
from trimkv_edge.runtime.engines.gate_rows import GateRows
from trimkv_edge.runtime.engines.onnx import PROVIDERS, Array, OnnxEngine
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine

_LOG = logging.getLogger(__name__)
DEVICES = ("cuda", "cpu")
# Numbers of a step lie this many int64 apart: 256 bytes, as device allocations do.
_APART = 32
_GRAPH_IDS = counter(1)
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


class OnnxCudaEngine(OnnxEngine):
    """Runs the ``onnx`` target of an artefact on a GPU.

    Every state tensor is one allocation on the device, bound as ``past.X`` and ``present.X``. Tokens and numbers of a
    step are copied to a fixed place there, logits back. Steps of one token are replayed from a CUDA graph; ONNX Runtime
    runs the one it captures more than once, which changes nothing, as a step writes the same again.

    Args:
        folder, manifest, target, threads, profile: see :class:`OnnxEngine`.
        device: ``cuda``, or ``cpu`` to test with.
        capture: whether steps of one token are captured.

    Raises:
        ConfigError: unknown device.
        ArtefactError: as :class:`OnnxEngine`; also a cache that CUDA's attention does not read.
        BudgetError: the device has no room.
        TrimKVError: there is no CUDA to run on, or a graph would run on the CPU in part.
    """

    name = "onnx:cuda"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: Target,
        threads: int | None = None,
        *,
        profile: bool = False,
        device: str = "cuda",
        capture: bool = True,
    ) -> None:
        if device not in DEVICES:
            raise ConfigError(f"device {device!r} is not known: use one of {', '.join(DEVICES)}")
        self._device = device
        self._capture = capture and device == "cuda" and not profile
        if device == "cuda":
            _check_cache(folder, manifest, target)
        super().__init__(folder, manifest, target, threads, profile=profile)

    @property
    def _narrow(self) -> bool:
        return self._device == "cpu" and super()._narrow

    def _check_floats(self) -> None:
        if self._device == "cpu":
            super()._check_floats()

    def _providers(self, role: str) -> Sequence[Any]:
        if self._device == "cpu":
            return PROVIDERS
        # Ranks are decided in float32; TF32 would leave 11 bits of it.
        options = {"device_id": "0", "use_tf32": "0"}
        if self._capture and role == "decoder":
            options["enable_cuda_graph"] = "1"
        return [(CUDA, options), *PROVIDERS]

    def _session_options(self, role: str, threads: int) -> Any:
        options = super()._session_options(role, threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _load(self, role: str, threads: int) -> Any:
        if self._device == "cpu":
            return super()._load(role, threads)
        if missing := why_not(self._ort):
            raise TrimKVError(f"{self.name} cannot run: {missing}")
        self._ort.set_default_logger_severity(3)  # errors only: it warns of every ScatterND
        try:
            session = super()._load(role, threads)
        except ArtefactError as error:
            if failed := failure(str(error.__cause__)):
                raise TrimKVError(f"{self.name} cannot run: {failed}") from error
            if not self._capture or "graph capture" not in str(error.__cause__):
                raise
            _LOG.warning("steps are not captured in a CUDA graph: %s", error)
            self._capture = False
            session = super()._load(role, threads)
        require_device(session, self._file(role))
        return session

    def _open_cache(self) -> None:
        self._values: dict[str, Any] = {}
        self._every, self._captured = self._run_options("-1"), self._run_options(str(next(_GRAPH_IDS)))
        super()._open_cache()
        if self._gate_rows:
            self._gate_row = self._gate_rows.rows[:, :1]

    def _run_options(self, graph: str) -> Any:
        """Options of runs that belong to one CUDA graph; -1: to none."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        return options

    def _numbers(self) -> tuple[Array, Array, Array]:
        # One array for all that a step needs, so that one copy brings it to the device; ids follow.
        self._step = np.zeros(3 * _APART + self.config.prefill_chunk, np.int64)
        position, live_length, seen = (self._step[start : start + 1] for start in range(0, 3 * _APART, _APART))
        return position, live_length, seen

    def _chunk(self, count: int) -> Array:
        return self._step[3 * _APART :][None, :count]

    def _roots(self) -> dict[str, Array]:
        """Host arrays that stand for an allocation on the device each; all others are views of them."""
        state = {name: array for name, array in self._arrays.items() if array.base is None}
        rows = {"gate_rows": self._gate_rows.rows} if self._gate_rows else {}
        return {**state, "step": self._step, "logits": self._logits, **rows}

    def _value(self, name: str) -> Any:
        """The allocation of a root."""
        if name not in self._values:
            root = self._roots()[name]
            make = self._ort.OrtValue.ortvalue_from_shape_and_type
            try:
                self._values[name] = make(root.shape, root.dtype.type, self._device, 0)
            except RuntimeError as error:
                raise BudgetError(
                    f"the GPU has no room for {name}, {format_bytes(root.nbytes)} of the cache ({first_line(error)}): "
                    "free its memory, or export with a smaller --budget"
                ) from error
        return self._values[name]

    def _attach(self, binding: Any, name: str, array: Array, *, output: bool = False) -> None:
        for root_name, root in self._roots().items():
            offset = array.ctypes.data - root.ctypes.data
            if 0 <= offset < root.nbytes:
                bind = binding.bind_output if output else binding.bind_input
                address = self._value(root_name).data_ptr() + offset
                kind = _BFLOAT16 if array.dtype == np.uint16 else array.dtype.type
                bind(name, self._device, 0, kind, array.shape, address)
                return
        raise AssertionError(f"{name} has no place on the device")

    def _run(self, session: Any, binding: Any, count: int = 0) -> None:
        self._value("step").update_inplace(self._step)
        # The event must run once: it moves entries, where a step writes the same again.
        session.run_with_iobinding(binding, self._captured if self._capture and count == 1 else self._every)

    def _keep(self, rows: GateRows, count: int, live: int) -> None:
        """Rows stay on the device, where the gates read them at once: graphs for GPUs have gates in the decoder."""
        rows.waiting = count
        try:
            self._settle(live + count)
        finally:
            rows.waiting = 0

    def _last_logits(self) -> FloatArray:
        logits: FloatArray = np.array(self._value("logits").numpy()[0, 0])
        return logits

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """While open, ``_arrays`` are zero and to be filled; then the device gets them."""
        self._arrays = self._allocate()
        yield
        for name, array in self._roots().items():
            self._value(name).update_inplace(array)
        self._arrays = self._allocate()  # zeros that nothing has touched take no memory

    def _fetch(self, *names: str) -> None:
        """Copies state from the device into ``_arrays``."""
        for name in names:
            np.copyto(self._arrays[name], self._value(name).numpy())

    def _reset(self) -> None:
        with self._stored():
            super()._reset()

    def _kept_positions(self) -> IntArray:
        self._fetch("positions")
        return super()._kept_positions()

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        self._fetch(*(name for name, array in self._arrays.items() if array.base is None))
        state = super()._read()
        self._arrays = self._allocate()
        return state

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        with self._stored():
            super()._write(key, value, log_beta, kept, seen, live)


class OnnxCudaPooledEngine(OnnxCudaEngine, OnnxPooledEngine):
    """The same where heads share a budget: a layer's heads are parts of one allocation."""

    def _lengths(self) -> IntArray:
        self._fetch("lengths")
        return super()._lengths()


def _check_cache(folder: Path, manifest: Manifest, target: Target) -> None:
    """CUDA has GroupQueryAttention for 16-bit floats alone."""
    if target.ops == "gqa" and manifest.cache.kv_dtype not in ("float16", "bfloat16"):
        raise ArtefactError(
            f"{folder} attends in float32 with operators that CUDA has for 16-bit floats only: export with --quant "
            "fp16, bf16 or int4-fp16, or with --onnx-ops standard and --quant none"
        )
