"""Exports a small random model to host-evicted graphs and opens it, shared by tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx_artefact import Artefact, make_manifest
from oracle_model import OracleModel

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.export.host_evicted import export_host_evicted
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.host_evicted import HostEvictedEngine

SIZES = (8, 3, 1, 1, 5, 8, 1)


class HostArtefact(Artefact):
    """An exported model beside the eager one it was made from."""

    def host(self) -> HostEvictedEngine:
        return HostEvictedEngine(self.folder, self.manifest, self.target, threads=1)


def make_host(folder: Path, model: GatedModel, config: CacheConfig) -> HostArtefact:
    """Exports ``model`` into ``folder``."""
    target = export_host_evicted(model, config, folder)
    return HostArtefact(folder, model, make_manifest(model, config, target), target)


def compare(engine: Engine, eager: Engine, oracle: OracleModel, tokens: Sequence[int]) -> int:
    """Reads ``tokens`` in chunks of ``SIZES`` with all three: equal logits, greedy tokens and survivors, which engines
    have in the same slots. Returns the number of events."""
    start, turn, events = 0, 0, 0
    while start < len(tokens):
        count = min(SIZES[turn % len(SIZES)], eager.room, len(tokens) - start)
        chunk = tokens[start : start + count]
        want, got, plain = eager.prefill(chunk), engine.prefill(chunk), oracle.read(chunk)
        assert max(np.abs(want - got).max(), np.abs(plain - got).max()) <= 1e-4
        assert want.argmax() == got.argmax()
        if eager.room == 0:
            eager.evict()
            engine.evict()
            events += 1
            np.testing.assert_array_equal(eager.survivors(), engine.survivors())
            np.testing.assert_array_equal(oracle.positions(), np.sort(engine.survivors(), axis=-1))
        start, turn = start + count, turn + 1
    return events
