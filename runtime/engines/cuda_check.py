"""Why ONNX Runtime does not run on CUDA here, in one line, and whether a session really does.

ONNX Runtime itself goes on with the CPU and a message in the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from pathlib import Path
from typing import Any

from trimkv_edge.errors import TrimKVError

CUDA = "CUDAExecutionProvider"
# What ONNX Runtime computes on the host on purpose, to know shapes. Any other operator there is a fall-back.
HOST_OPS = frozenset({"Shape", "Size", "Squeeze", "Unsqueeze", "Gather", "Concat"})
_INSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'trimkv-edge[onnx-gpu]'"
_LIBRARIES = "pip install 'trimkv-edge[onnx-gpu]', which brings CUDA 13 and cuDNN 9"
_CODES = {100: "no GPU", 803: "driver and kernel module of different versions", 999: "unknown error"}


def why_not(ort: Any) -> str | None:
    """What is missing to run on CUDA, with the remedy; None if nothing is known to be.

    Args:
        ort: the onnxruntime module; its libraries are loaded.
    """
    if CUDA not in ort.get_available_providers():
        return (
            f"the onnxruntime {ort.__version__} that is installed has no {CUDA}; it and onnxruntime-gpu write to one "
            f"folder, so only one can be there: {_INSTALL}"
        )
    return _driver(str(getattr(ort, "cuda_version", None) or "13.0")) or _libraries(ort)


def _driver(wanted: str) -> str | None:
    """What is wrong with the driver; ``wanted``: version of CUDA as ``major.minor``."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver is installed ({error}): install one for CUDA {wanted} (580 or newer for CUDA 13)"
    if code := int(cuda.cuInit(0)):
        told = f" ({_CODES[code]})" if code in _CODES else ""
        return f"the NVIDIA driver does not start, its error is {code}{told}: see what nvidia-smi says"
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 < int(wanted.split(".", maxsplit=1)[0]):
        has = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {has}, but onnxruntime needs {wanted}: install driver 580 or newer"
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return "the NVIDIA driver shows no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    return None


def _libraries(ort: Any) -> str | None:
    """Which library ONNX Runtime's provider does not find."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; it is told below
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    names = (
        ("onnxruntime_providers_shared.dll", "onnxruntime_providers_cuda.dll")
        if sys.platform == "win32"
        else ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")
    )
    for name in names:
        try:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"{name} does not load ({error}): {_LIBRARIES}"
    return None


def failure(text: str) -> str | None:
    """What a call of CUDA or its libraries said, in a message of ONNX Runtime's; None if it tells of none."""
    if found := re.search(r"(?:CUDA|CUBLAS|CUDNN|CURAND) failure \d+: [^;]*[^; ]", text):
        return f"{found[0]}: see that the driver is for CUDA 13 (580 or newer) and the GPU is free; {_LIBRARIES}"
    if "cuDNN is unavailable" in text:
        return f"cuDNN 9 was not found: {_LIBRARIES}"
    if "Failed to allocate memory" in text:
        return "the GPU has too little free memory: free some, or export with fewer bits"
    return None


def require_device(session: Any, path: Path) -> None:
    """Refuses a session that runs on the CPU, or of which a part does.

    Args:
        session: made with ``session.record_ep_graph_assignment_info``.
        path: its graph, for the message.

    Raises:
        TrimKVError: it does.
    """
    if CUDA not in session.get_providers():
        raise TrimKVError(
            f"{path} did not get CUDA, though its libraries load: cuDNN 9 or the GPU is of no use to ONNX Runtime, "
            f"which says why on stderr; {_LIBRARIES}"
        )
    found = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != CUDA
        for node in part.get_nodes()
    }
    if stray := sorted(found - HOST_OPS):
        raise TrimKVError(
            f"{path} would run {', '.join(stray)} on the CPU, because ONNX Runtime's CUDA has no kernel for it here: "
            "export with --quant fp16, bf16 or int4-fp16, or with --onnx-ops standard and --quant none"
        )
