"""The tools that are compared, how each is installed, and what it calls its quantisation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".venvs"
QUANTS = ("none", "int8", "int4")
REFERENCE = "ours-onnx"  # ratios are against this one


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        worker: script that builds and serves it.
        environment: name of its environment; None: the one that runs this program, with trimkv-edge in it.
        requirements: pinned packages of that environment.
        schemes: from ``--quant`` to what the tool gets; a missing key: it has no such form.
        element: bytes of a cache element; 0: the cache does not grow with the context.
        options: further settings of the worker.
        fixed_length: the build holds the longest context, so that each length is a build of its own.
        weights: data type of the weights for the table where it does not follow from the scheme.
    """

    worker: str
    environment: str | None
    requirements: tuple[str, ...]
    schemes: dict[str, str]
    element: int
    options: dict[str, str] = field(default_factory=dict)
    fixed_length: bool = False
    weights: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of its environment, whether it exists or not."""
        return Path(sys.executable) if self.environment is None else ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def script(self) -> Path:
        return HERE / self.worker

    def label(self, quant: str) -> str:
        """The data type of its weights."""
        return self.weights or {"none": "float32"}.get(self.schemes[quant], self.schemes[quant])


def _ours(engine: str, schemes: dict[str, str], kv_dtype: str = "float32") -> Peer:
    options = {"engine": engine, "budget": "1024", "buffer": "128", "kv_dtype": kv_dtype}
    return Peer("worker_ours.py", None, (), schemes, 0, options)


def _transformers(cache: str, dtype: str, compile_step: str = "no") -> Peer:
    options = {"cache": cache, "dtype": dtype, "compile": compile_step}
    # It has no 4-bit kernels on a CPU: the row shows what a user without another tool has.
    return Peer(
        "worker_transformers.py",
        None,
        (),
        dict.fromkeys(QUANTS, "none"),
        4 if dtype == "float32" else 2,
        options,
        weights=dtype,
    )


def _llama(flash: str) -> Peer:
    schemes = {"none": "none", "int8": "Q8_0", "int4": "Q4_0"}
    return Peer("worker_llama.py", "llama.cpp", _LLAMA, schemes, 2, {"flash": flash})


_GENAI = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "onnxscript==0.7.2",
    "psutil",
)
_OPTIMUM = ("optimum-executorch==1.1.0", "executorch==1.5.1", "torch==2.13.0", "psutil")
_LLAMA = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy", "psutil")

PEERS = {
    "ours-onnx": _ours("onnx", {"none": "none", "int8": "int8", "int4": "int4"}),
    "ours-onnx-int8-cache": _ours("onnx", {"none": "none", "int8": "int8", "int4": "int4"}, "int8"),
    "ours-executorch": _ours("executorch", {"none": "none", "int8": "int8", "int4": "8da4w"}),
    "genai": Peer("worker_genai.py", "genai", _GENAI, {"none": "none", "int4": "int4"}, 4),
    "llama.cpp": _llama("auto"),
    "llama.cpp-no-flash": _llama("off"),
    "optimum-executorch": Peer(
        "worker_optimum.py", "optimum-executorch", _OPTIMUM, {"none": "none", "int4": "8da4w"}, 4, fixed_length=True
    ),
    "transformers": _transformers("dynamic", "float32"),
    "transformers-bf16": _transformers("dynamic", "bfloat16"),
    "transformers-static": _transformers("static", "float32"),
    "transformers-compiled": _transformers("static", "float32", "yes"),
}
