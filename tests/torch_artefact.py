"""A folder with the ``torch`` target of a small model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from onnx_artefact import make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.torch_weights import export_torch
from trimkv_edge.manifest import Manifest, describe_files
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import hollow, model_weights

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


def save_torch_artefact(
    folder: Path, model: GatedModel, scheme: str = "none", config: CacheConfig = CONFIG, shard: int = 0
) -> Manifest:
    """A whole artefact, from a hollow copy of the base as large models are; ``shard``: bytes of a file."""
    empty = copy.deepcopy(model)
    hollow(empty)
    more = {"shard": shard} if shard else {}
    target = export_torch(empty, folder, scheme=SCHEMES[scheme], weights=model_weights(model), **more)
    manifest = replace(
        make_manifest(model, config, target),
        targets={"torch": target},
        files=describe_files(folder),
        dtype=SCHEMES[scheme].dtype,
        quantization=scheme,
    )
    manifest.save(folder)
    return manifest
