"""ONNX engines with a fault each, which verification has to find."""

from __future__ import annotations

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.runtime.engines.onnx import OnnxEngine


class KeepsTheNewest(OnnxEngine):
    """Evicts by age: right logits until the first event."""

    def _evict(self, seen: int) -> None:
        self._arrays["log_beta"].fill(-1.0)
        super()._evict(seen)


class ReadsAhead(OnnxEngine):
    """Positions off by one."""

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        return super()._forward(ids, position + position // 20, live)
