"""Exports a small random model to ExecuTorch and opens it, shared by tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_artefact import make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.executorch import PROGRAM, build_program
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine


@dataclass
class ExecuTorchArtefact:
    """An exported model, its program as ExecuTorch's compiler holds it, and the eager model it was made from."""

    folder: Path
    model: GatedModel
    manifest: Manifest
    target: Target
    program: Any

    def eager(self) -> EagerEngine:
        return EagerEngine(self.model, self.manifest.cache)

    def engine(self, threads: int | None = 1) -> ExecuTorchEngine:
        return ExecuTorchEngine(self.folder, self.manifest, self.target, threads)


def make_executorch(folder: Path, model: GatedModel, config: CacheConfig, ops: str) -> ExecuTorchArtefact:
    """Like ``export_executorch``, but keeps the program for inspection."""
    program = build_program(model, config, ops=ops, metadata={"get_eos_ids": [2, 3]})
    folder.mkdir(parents=True)
    with (folder / PROGRAM).open("wb") as stream:
        program.write_to_file(stream)
    target = Target("executorch", ops, {"program": PROGRAM})
    return ExecuTorchArtefact(folder, model, make_manifest(model, config, target), target, program)
