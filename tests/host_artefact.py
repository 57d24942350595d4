"""Exports a small random model to host-evicted graphs and opens it, shared by tests."""

from __future__ import annotations

from pathlib import Path

from onnx_artefact import Artefact, make_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.host_evicted import export_host_evicted
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine


class HostArtefact(Artefact):
    """An exported model beside the eager one it was made from."""

    def host(self) -> HostEvictedEngine:
        return HostEvictedEngine(self.folder, self.manifest, self.target, threads=1)


def make_host(folder: Path, model: GatedModel, config: CacheConfig) -> HostArtefact:
    """Exports ``model`` into ``folder``."""
    target = export_host_evicted(model, config, folder)
    return HostArtefact(folder, model, make_manifest(model, config, target), target)
