"""Compiles a small random model with one of the backends, shared by tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_artefact import Artefact, make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends import BACKENDS
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.targets import Job
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import model_weights


def need(name: str) -> None:
    """Skips where the compiler of a target is not installed."""
    if missing := BACKENDS[name].missing():
        pytest.skip(f"{', '.join(missing)} is not installed: {BACKENDS[name].install}", allow_module_level=True)


def job_for(model: GatedModel, config: CacheConfig, folder: Path, precision: str) -> Job:
    """What the command line makes of ``--precision``."""
    return Job(
        model=model,
        weights=model_weights(model),
        config=config,
        folder=folder,
        ops=precision,
        scheme=SCHEMES["none"],
        tokenizer=None,
        scales=None,
        key="",
        restart=False,
        say=lambda line: None,
        progress=None,
    )


def compiled(name: str, model: GatedModel, config: CacheConfig, folder: Path, precision: str) -> Artefact:
    """Compiles ``model`` into ``folder``."""
    target = BACKENDS[name].export(job_for(model, config, folder, precision))
    return Artefact(folder, model, make_manifest(model, config, target), target)
