"""The engine for CUDA. No GPU is here: its code runs over memory of the CPU, and what hinders CUDA is told."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_artefact import CASES, CONFIG, POOLED, cuda_artefact
from factories import random_tokens
from onnx_artefact import Artefact, check_another, feed, same
from text_artefact import text_artefact

from trimkv_edge.cli import run
from trimkv_edge.errors import ArtefactError, BudgetError, ConfigError, TrimKVError
from trimkv_edge.runtime.artefact import Artefact as Loaded
from trimkv_edge.runtime.engines import choose_engine, cuda_check, engine_class, load_engine, onnx_cuda
from trimkv_edge.runtime.engines.cuda_check import CUDA, failure, require_device, why_not
from trimkv_edge.runtime.engines.onnx import OnnxEngine
from trimkv_edge.runtime.engines.onnx_cuda import OnnxCudaEngine, OnnxCudaPooledEngine
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine

SIZES = (4, 3, 1, 1, 2)
MAKE = onnxruntime.OrtValue.ortvalue_from_shape_and_type
ON_CPU = [name for name in CASES if name != "bfloat16"]
NO_CUDA = CUDA not in onnxruntime.get_available_providers()


def plain(artefact: Artefact) -> OnnxEngine:
    kind = OnnxEngine if artefact.manifest.cache.caps is None else OnnxPooledEngine
    return kind(artefact.folder, artefact.manifest, artefact.target, 1)


def bound(artefact: Artefact, kind: type[OnnxCudaEngine] | None = None, **settings: Any) -> OnnxCudaEngine:
    """The engine for CUDA, over memory of the CPU."""
    kind = kind or (OnnxCudaEngine if artefact.manifest.cache.caps is None else OnnxCudaPooledEngine)
    return kind(artefact.folder, artefact.manifest, artefact.target, 1, device="cpu", **settings)


def greedy(engine: OnnxEngine, tokens: list[int], count: int) -> list[int]:
    """What follows ``tokens``, and events on the way."""
    logits, out = feed(engine, tokens, SIZES)[-1], []
    for _ in range(count):
        out.append(int(logits.argmax()))
        if engine.room == 0:
            engine.evict()
        logits = engine.decode(out[-1])
    return out


@pytest.mark.parametrize("name", ON_CPU)
def test_the_same_bits_as_on_numpy_arrays(name: str) -> None:
    one, other = plain(cuda_artefact(name)), bound(cuda_artefact(name))
    tokens, budget = random_tokens(90, seed=3), cuda_artefact(name).manifest.cache.budget
    for start in range(0, 90, 10):
        assert same(*(feed(engine, tokens[start : start + 10], SIZES) for engine in (one, other)))
        np.testing.assert_array_equal(one.survivors(), other.survivors())
    assert 90 - budget >= 5 * cuda_artefact(name).manifest.cache.buffer
    first, second = one.state(), other.state()
    for field in ("key", "value", "log_beta", "positions"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize("name", ["float16", "pooled"])
def test_the_same_greedy_tokens(name: str) -> None:
    engines = plain(cuda_artefact(name)), bound(cuda_artefact(name))
    first, second = (greedy(engine, random_tokens(60, seed=4), 40) for engine in engines)
    assert first == second


@pytest.mark.parametrize("name", ON_CPU)
def test_states_move_both_ways(name: str) -> None:
    for source, target in ((plain, bound), (bound, plain), (bound, bound)):
        one, other = source(cuda_artefact(name)), target(cuda_artefact(name))
        feed(one, random_tokens(63, seed=5), SIZES)
        feed(other, random_tokens(41, seed=6), SIZES)
        other.load_state(one.state())
        rest = random_tokens(40, seed=7)
        assert same(feed(one, rest, SIZES), feed(other, rest, SIZES))
        np.testing.assert_array_equal(one.survivors(), other.survivors())


@pytest.mark.parametrize("name", ["float32", "pooled"])
def test_streams_of_one_model_are_apart(name: str) -> None:
    check_another(lambda: bound(cuda_artefact(name)))


@pytest.mark.parametrize("name", ["float16", "pooled"])
def test_reset_begins_anew(name: str) -> None:
    engine = bound(cuda_artefact(name))
    feed(engine, random_tokens(57, seed=8), SIZES)
    engine.reset()
    tokens = random_tokens(57, seed=9)
    assert same(feed(engine, tokens, SIZES), feed(plain(cuda_artefact(name)), tokens, SIZES))


class Recorded(OnnxCudaEngine):
    """Notes what is bound where."""

    def _open_cache(self) -> None:
        self.places: dict[tuple[int, str], int] = {}
        super()._open_cache()

    def _attach(self, binding: Any, name: str, array: Any, *, output: bool = False) -> None:
        class Spy:
            bind_input = bind_output = staticmethod(
                lambda label, device, number, kind, shape, address: self.places.update({(id(binding), label): address})
            )

        super()._attach(Spy(), name, array, output=output)
        super()._attach(binding, name, array, output=output)


def test_past_and_present_are_one_place_that_stays() -> None:
    engine = bound(cuda_artefact("standard"), Recorded)
    assert isinstance(engine, Recorded)
    feed(engine, random_tokens(30), SIZES)
    places, values = dict(engine.places), {name: value.data_ptr() for name, value in engine._values.items()}
    state = {name.removeprefix("past."): place for (_, name), place in places.items() if name.startswith("past.")}
    for (binding, name), place in places.items():
        if name.startswith("present."):
            assert places[binding, name.replace("present.", "past.")] == place
        if name.startswith(("past.", "present.")):
            assert state[name.split(".", 1)[1]] == place  # of every graph and every chunk length
    # Numbers and tokens of a step are in one block, a multiple of 256 bytes from its beginning.
    step = engine._values["step"].data_ptr()
    plain_inputs = {name: place - step for (_, name), place in places.items() if "." not in name and name != "logits"}
    assert plain_inputs == {"position": 0, "live_length": 256, "seen": 512, "input_ids": 768}
    # Two layers of keys and values, log-betas, positions, the step, logits.
    assert len(values) == 2 * 2 + 4
    engine.load_state(engine.state())
    feed(engine, random_tokens(50), SIZES)
    engine.reset()
    feed(engine, random_tokens(50), SIZES)
    assert engine.places == places
    assert {name: value.data_ptr() for name, value in engine._values.items()} == values


def test_a_step_copies_its_numbers_in_once() -> None:
    engine = bound(cuda_artefact("standard"))
    feed(engine, random_tokens(30), SIZES)
    copied: list[int] = []

    class Counts:
        def __init__(self, value: Any) -> None:
            self.value = value

        def update_inplace(self, array: np.ndarray) -> None:
            copied.append(array.nbytes)
            self.value.update_inplace(array)

        def numpy(self) -> np.ndarray:
            copied.append(-self.value.numpy().nbytes)
            return self.value.numpy()

    engine._values = {name: Counts(value) for name, value in engine._values.items()}
    engine.decode(5)
    vocabulary = engine.vocab_size * 4
    assert copied == [3 * 256 + 4 * 8, -vocabulary]


def test_only_steps_of_one_token_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = bound(cuda_artefact("float32")), bound(cuda_artefact("float32"))
    ran: list[tuple[str, str]] = []

    def spy(session: Any, label: str) -> Any:
        def run_with_iobinding(binding: Any, options: Any) -> None:
            ran.append((label, options.get_run_config_entry("gpu_graph_id")))
            session.run_with_iobinding(binding, options)

        return SimpleNamespace(run_with_iobinding=run_with_iobinding, io_binding=session.io_binding)

    for each in (engine, other):
        monkeypatch.setattr(each, "_capture", True)
        monkeypatch.setattr(each, "_decoder", spy(each._decoder, "step"))
        monkeypatch.setattr(each, "_evictor", spy(each._evictor, "event"))
    for size in (4, 4, 4, 3, 1):
        engine.prefill(random_tokens(size))
    engine.evict()
    engine.decode(3)
    other.decode(3)
    labels = [label for label, _ in ran]
    graphs = [graph for _, graph in ran]
    assert labels == ["step"] * 5 + ["event", "step", "step"]
    assert graphs[:4] == ["-1"] * 4
    assert graphs[5] == "-1"  # it must not run twice
    # Every engine has a graph of its own: a captured one reads and writes fixed places.
    assert int(graphs[4]) > 0
    assert graphs[6] == graphs[4] != graphs[7]


def test_without_capture_no_step_belongs_to_a_graph() -> None:
    engine = bound(cuda_artefact("float32"))
    assert engine._capture is False  # there is nothing to capture on a CPU
    assert engine._providers("decoder") == ("CPUExecutionProvider",)
    engine._device, engine._capture = "cuda", True
    (name, options), last = engine._providers("decoder")
    assert (name, last) == (CUDA, "CPUExecutionProvider")
    assert options == {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1"}
    assert engine._providers("evict")[0][1] == {"device_id": "0", "use_tf32": "0"}


def test_settings_that_cannot_be_honoured() -> None:
    artefact = cuda_artefact("float32")
    with pytest.raises(ConfigError, match="device 'tpu' is not known: use one of cuda, cpu"):
        OnnxCudaEngine(artefact.folder, artefact.manifest, artefact.target, device="tpu")
    with pytest.raises(
        ArtefactError,
        match=r"attends in float32 .* export with --quant fp16, bf16 or int4-fp16, or with --onnx-ops stan",
    ):
        OnnxCudaEngine(artefact.folder, artefact.manifest, artefact.target)


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("name", ["float16", "standard", "pooled"])
def test_the_package_for_the_cpu_is_named(name: str) -> None:
    artefact = cuda_artefact(name)
    kind = engine_class("onnx:cuda", artefact.manifest.cache)
    with pytest.raises(TrimKVError, match=rf"has no {CUDA}; .*pip install 'trimkv-edge\[onnx-gpu\]'") as error:
        kind(artefact.folder, artefact.manifest, artefact.target)
    assert "\n" not in str(error.value)


def gpu_package(tmp_path: Path, cuda: str = "13.0") -> Any:
    """As much of onnxruntime-gpu as is asked."""
    (tmp_path / "capi").mkdir()
    return SimpleNamespace(
        __version__="1.31.1",
        __file__=str(tmp_path / "__init__.py"),
        cuda_version=cuda,
        get_available_providers=lambda: [CUDA, "CPUExecutionProvider"],
        preload_dlls=lambda: print("Failed to load libcudnn.so.9"),
    )


def driver(code: int = 0, version: int = 13010, count: int = 1, failed: int = 0) -> Any:
    def write(value: int) -> Callable[[Any], int]:
        def to(pointer: Any) -> int:
            pointer._obj.value = value
            return failed

        return to

    return SimpleNamespace(cuInit=lambda flags: code, cuDriverGetVersion=write(version), cuDeviceGetCount=write(count))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (driver(code=803), r"does not start, its error is 803 \(driver and kernel module of different versions\)"),
        (driver(code=7), r"does not start, its error is 7: see what nvidia-smi says"),
        (driver(version=12080), r"driver is for CUDA 12.8, but onnxruntime needs 13.0: install driver 580 or newer"),
        (driver(count=0), r"shows no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"),
        (driver(), r"libonnxruntime_providers_shared.so does not load .*pip install 'trimkv-edge\[onnx-gpu\]'"),
        (None, r"no NVIDIA driver is installed \(libcuda.so.1: .*\): install one for CUDA 13.0"),
    ],
)
def test_what_is_missing_is_told(
    found: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ctypes.CDLL

    def load(name: str, *args: Any, **settings: Any) -> Any:
        if name != "libcuda.so.1":
            return real(name, *args, **settings)
        if found is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return found

    monkeypatch.setattr(cuda_check.ctypes, "CDLL", load)
    told = why_not(gpu_package(tmp_path))
    assert told is not None
    assert re.search(message, told), told
    assert "\n" not in told
    assert capsys.readouterr().out == ""


# As onnxruntime-gpu 1.31.1 said them, with its libraries but no driver's.
REFUSED = (
    "/onnxruntime_src/cuda_execution_provider_info.cc:63 [ONNXRuntimeError] : 1 : FAIL : "
    'provider_options_utils.h:187 Parse Failed to parse provider option "device_id": CUDA failure 36: API call is not '
    "supported in the installed CUDA driver ; GPU=-1 ; hostname=vm ; expr=cudaGetDeviceCount(&num_devices); \n"
)
NO_CUDNN = (
    "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /onnxruntime_src/cuda_call.cc:105 CudaCall "
    "[with ERRTYPE = cudnnStatus_t] cuDNN is unavailable for CUDA Execution Provider: \n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REFUSED, r"^CUDA failure 36: API call is not supported in the installed CUDA driver: see .*580 or newer"),
        (NO_CUDNN, r"^cuDNN 9 was not found: pip install 'trimkv-edge\[onnx-gpu\]'"),
        ("FAIL : Failed to allocate memory for requested buffer of size 4", "^the GPU has too little free memory"),
        ("Protobuf parsing failed", None),
    ],
)
def test_what_cuda_says_is_passed_on(text: str, message: str | None) -> None:
    told = failure(text)
    assert (told is None) == (message is None)
    if told is not None and message is not None:
        assert re.search(message, told), told
        assert "\n" not in told


class LoadsAsIfOnCuda(OnnxCudaEngine):
    """Comes to its sessions on the CPU by the way of CUDA; the first may fail."""

    says = ""

    def _providers(self, role: str) -> Any:
        if self.says and (self._capture or "graph capture" not in self.says):
            raise ArtefactError("does not load") from RuntimeError(self.says)
        return ("CPUExecutionProvider",)


def opened_as_if(says: str, monkeypatch: pytest.MonkeyPatch) -> OnnxCudaEngine:
    artefact = cuda_artefact("float16")
    monkeypatch.setattr(onnx_cuda, "why_not", lambda ort: None)
    monkeypatch.setattr(onnx_cuda, "require_device", lambda session, path: None)
    monkeypatch.setattr(LoadsAsIfOnCuda, "says", says)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda level: None)
    on_cpu = staticmethod(lambda shape, kind, device, number: MAKE(shape, kind))
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", on_cpu)
    return LoadsAsIfOnCuda(artefact.folder, artefact.manifest, artefact.target, 1)


def test_a_session_that_cuda_refuses_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrimKVError, match=r"^onnx:cuda cannot run: CUDA failure 36: API call") as error:
        opened_as_if(REFUSED, monkeypatch)
    assert not isinstance(error.value, ArtefactError)
    with pytest.raises(ArtefactError, match="does not load"):
        opened_as_if("Protobuf parsing failed", monkeypatch)


def test_a_graph_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "This session cannot use the graph capture feature as requested by the user as all compute graph nodes have"
    assert opened_as_if(said, monkeypatch)._capture is False
    assert [record.getMessage() for record in caplog.records] == [
        "steps are not captured in a CUDA graph: does not load"
    ]
    assert opened_as_if("", monkeypatch)._capture is True


def test_a_device_without_room_is_a_budget_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0\nmore")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", full)
    with pytest.raises(BudgetError, match=r"no room for .*, .* of the cache \(CUDA failure 2: out of memory ; GPU=0\)"):
        bound(cuda_artefact("float16"))


@pytest.mark.skipif(why_not(onnxruntime) is not None, reason="no CUDA here")
@pytest.mark.parametrize("name", ["float16", "standard", "pooled"])
def test_on_cuda_itself(name: str) -> None:
    artefact = cuda_artefact(name)
    kind = engine_class("onnx:cuda", artefact.manifest.cache)
    engines = plain(artefact), kind(artefact.folder, artefact.manifest, artefact.target, 1)
    tokens = random_tokens(90, seed=3)
    for start in range(0, 90, 10):
        one, other = (feed(engine, tokens[start : start + 10], SIZES) for engine in engines)
        assert np.abs(one[-1] - other[-1]).max() < (1e-4 if name != "float16" else 4e-3 * np.abs(one[-1]).max())
        if name != "float16":
            np.testing.assert_array_equal(*(engine.survivors() for engine in engines))


def test_sessions_that_use_the_cpu_are_refused() -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = cuda_artefact("float16").folder / "decoder.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with pytest.raises(TrimKVError, match=r"decoder.onnx did not get CUDA"):
        require_device(session, path)

    # The same session's record, as if its provider were CUDA with a part on the CPU.
    def claims(*hosted: str) -> Any:
        def part(name: str, kinds: list[str]) -> Any:
            nodes = [SimpleNamespace(op_type=kind) for kind in kinds]
            return SimpleNamespace(ep_name=name, get_nodes=lambda: nodes)

        found = {node.op_type for each in session.get_provider_graph_assignment_info() for node in each.get_nodes()}
        assert "GroupQueryAttention" in found
        parts = [part(CUDA, sorted(found - set(hosted))), part("CPUExecutionProvider", list(hosted))]
        return SimpleNamespace(
            get_providers=lambda: [CUDA, "CPUExecutionProvider"], get_provider_graph_assignment_info=lambda: parts
        )

    require_device(claims("Shape", "Squeeze"), path)
    with pytest.raises(TrimKVError, match=r"would run GroupQueryAttention, MatMul on the CPU, .* --quant fp16"):
        require_device(claims("Shape", "MatMul", "GroupQueryAttention"), path)


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime-gpu is installed")
def test_auto_takes_the_cpu_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = Loaded.load(text_artefact())
    assert choose_engine(loaded, "onnx:auto") == "onnx:auto"
    assert choose_engine(loaded) == "onnx"
    engine = load_engine(loaded, "onnx:auto", 1)
    assert type(engine) is OnnxEngine
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("onnx:auto runs on the CPU, because ")
    assert captured.err.count("\n") == 1
    with pytest.raises(ArtefactError, match="attends in float32"):
        load_engine(loaded, "onnx:cuda", 1)


def test_variants_need_their_engines_target_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded.load(text_artefact())
    other = replace(loaded.manifest, targets={"executorch": loaded.manifest.targets["onnx"]})
    for name in ("onnx:cuda", "onnx:auto"):
        with pytest.raises(ArtefactError, match=r"has no onnx target, only executorch: .*--target onnx"):
            choose_engine(replace(loaded, manifest=other), name)
    with pytest.raises(ConfigError, match=r"'onnx:rocm' is not known; use one of onnx, .*, onnx:cuda, onnx:auto"):
        choose_engine(loaded, "onnx:rocm")
    monkeypatch.setattr("trimkv_edge.runtime.engines.find_spec", lambda name: None)
    with pytest.raises(TrimKVError, match=r"onnx:cuda needs onnxruntime\): pip install 'trimkv-edge\[onnx-gpu\]'"):
        choose_engine(loaded, "onnx:cuda")
    assert engine_class("onnx:cuda", CONFIG) is OnnxCudaEngine
    assert engine_class("onnx:auto", POOLED) is OnnxCudaPooledEngine


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime-gpu is installed")
def test_the_command_fails_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(text_artefact()), "--prompt", "the cat", "--max-new-tokens", "2"]
    with pytest.raises(SystemExit) as end:
        run.main([*arguments, "--engine", "onnx:cuda"])
    assert end.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["warning", "error"]
    run.main([*arguments, "--engine", "onnx:auto"])
    assert "onnx:auto runs on the CPU" in capfd.readouterr().err
