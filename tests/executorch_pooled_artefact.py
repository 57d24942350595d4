"""Small models with a budget that heads share, exported to ExecuTorch once and shared by test modules."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from executorch_artefact import ExecuTorchArtefact, make_executorch
from factories import gated_model
from onnx_artefact import spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.eager import EagerPooledEngine
from trimkv_edge.runtime.engines.executorch_pooled import ExecuTorchPooledEngine

# Heads of very different lengths; 11 % 4 leaves a short first segment, and the longest head ends within a state block.
CAPS = ((20, 5), (16, 9))
CONFIGS = {
    "xnnpack": CacheConfig(11, 4, 3, "global", sinks=2, min_per_head=3, caps=CAPS),
    "portable": CacheConfig(11, 4, 3, "layer", recent=2, threshold=0.02, caps=CAPS),
}
_FOLDER = tempfile.TemporaryDirectory(prefix="trimkv-test-")


class PooledArtefact(ExecuTorchArtefact):
    """An exported model beside the eager one it was made from."""

    def eager(self) -> EagerPooledEngine:  # type: ignore[override]
        return EagerPooledEngine(self.model, self.manifest.cache)

    def engine(self, threads: int | None = 1) -> ExecuTorchPooledEngine:  # type: ignore[override]
        return ExecuTorchPooledEngine(self.folder, self.manifest, self.target, threads)


@cache
def pooled_artefact(ops: str) -> PooledArtefact:
    """The artefact of an operator set."""
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    made = make_executorch(Path(_FOLDER.name) / ops, model, CONFIGS[ops], ops)
    return PooledArtefact(**vars(made))
