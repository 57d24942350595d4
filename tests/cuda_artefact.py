"""Small random models exported in the forms that ONNX Runtime's CUDA may be given, shared by tests."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from factories import gated_model
from onnx_artefact import Artefact, make_manifest, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.onnx_bf16 import emulate_bfloat16
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.runtime.engines.onnx import OnnxEngine

CONFIG = CacheConfig(budget=12, buffer=4, prefill_chunk=4)
POOLED = CacheConfig(22, 8, 8, "global", caps=((48, 16), (40, 24)))
# Operators, scheme, cache. CUDA's attention does not read the first.
CASES = {
    "float32": ("gqa", "none", CONFIG),
    "float16": ("gqa", "fp16", replace(CONFIG, kv_dtype="float16")),
    "int4": ("gqa", "int4-fp16", replace(CONFIG, kv_dtype="float16")),
    "bfloat16": ("gqa", "bf16", replace(CONFIG, kv_dtype="bfloat16")),
    "standard": ("standard", "none", CONFIG),
    "pooled": ("standard", "none", POOLED),
}


@cache
def cuda_artefact(name: str) -> Artefact:
    """One of ``CASES``, exported once per test run: copy it before changing it."""
    folder = Path(mkdtemp(prefix=f"cuda-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ops, scheme, config = CASES[name]
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    target = export_onnx(model, config, folder, ops=ops, scheme=SCHEMES[scheme])
    return Artefact(folder, model, make_manifest(model, config, target), target)


def emulated(artefact: Artefact, folder: Path, kind: type[OnnxEngine] = OnnxEngine, **more: Any) -> OnnxEngine:
    """The graphs of a bfloat16 artefact that a CPU runs, in a copy of it."""
    shutil.copytree(artefact.folder, folder, dirs_exist_ok=True)  # onnx reads no file of two names
    scratch = folder / "scratch"
    scratch.mkdir()
    target = emulate_bfloat16(folder, artefact.target, scratch)
    cache = replace(artefact.manifest.cache, kv_dtype="float32")
    return kind(folder, replace(artefact.manifest, cache=cache, **more), target, 1)
