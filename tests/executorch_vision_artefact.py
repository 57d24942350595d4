"""Small models that read pictures, exported to ExecuTorch once and shared by tests."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from factories import gated_vision_model
from onnx_artefact import spread_gates
from vision_artefact import SIZES, VisionArtefact, vision_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.executorch import PROGRAM, build_program, export_executorch
from trimkv_edge.export.executorch_vision import VISION
from trimkv_edge.manifest import Target
from trimkv_edge.runtime.engines.executorch_vision import ExecuTorchPooledVisionEngine, ExecuTorchVisionEngine

SMALL = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
ROOMY = CacheConfig(budget=160, buffer=32, prefill_chunk=32)
CAPS = ((16, 12), (9, 16), (16, 16))
CONFIGS = {"trimkv": SMALL, "global": replace(SMALL, policy="global", caps=CAPS, budget=10)}


_FOLDER = tempfile.TemporaryDirectory(prefix="trimkv-test-")


@cache
def executorch_artefact(ops: str, name: str) -> VisionArtefact:
    """The artefact of an operator set and settings: ``roomy``, or a key of ``CONFIGS``."""
    model, folder = spread_gates(gated_vision_model()), Path(_FOLDER.name) / f"{ops}-{name}"
    config = CONFIGS.get(name, ROOMY)
    if name == "trimkv":
        target = export_executorch(model, config, folder, ops=ops, sizes=SIZES)
    else:  # the encoder is the same for all
        target = Target("executorch", ops, {"program": PROGRAM, "vision": VISION})
        program = build_program(model, config, ops=ops, sizes=SIZES)
        folder.mkdir()
        with (folder / PROGRAM).open("wb") as stream:
            program.write_to_file(stream)
        shutil.copy(executorch_artefact(ops, "trimkv").folder / VISION, folder)
    return VisionArtefact(folder, model, vision_manifest(model, config, target), target)


def open_executorch(made: VisionArtefact) -> ExecuTorchVisionEngine | ExecuTorchPooledVisionEngine:
    """An engine of the kind that the artefact needs."""
    kind = ExecuTorchVisionEngine if made.manifest.cache.caps is None else ExecuTorchPooledVisionEngine
    return kind(made.folder, made.manifest, made.target, threads=1)
