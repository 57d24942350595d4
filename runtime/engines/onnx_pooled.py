"""The ONNX Runtime engine where heads share a budget: each head has its own number of slots."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.pooled_engine import PooledEngine
from trimkv_edge.runtime.engines.onnx import Array, OnnxEngine


class OnnxPooledEngine(PooledEngine, OnnxEngine):
    """Runs the ``onnx`` target of an artefact with caps.

    A layer's heads lie back to back in one buffer, at constant offsets; the decoder sees them one by one, the evict
    graph as one tensor.
    """

    def _allocate(self) -> dict[str, Array]:
        config = self.config
        assert config.caps is not None  # what this class is for
        rows, most = self.num_layers * self.num_kv_heads, max(max(caps) for caps in config.caps)
        arrays: dict[str, Array] = {
            "log_beta": np.zeros((rows, most + config.buffer), np.float32),
            "positions": np.zeros((rows, most), np.int64),
            "lengths": np.zeros(rows, np.int64),
        }
        for layer, caps in enumerate(config.caps):
            ends = [0, *accumulate(cap + config.buffer for cap in caps)]
            for kind in ("key", "value"):
                whole = arrays[f"{layer}.{kind}"] = np.zeros((ends[-1], self.head_dim), np.float32)
                for head, (start, end) in enumerate(pairwise(ends)):
                    arrays[f"{layer}.{head}.{kind}"] = whole[None, None, start:end]
        return arrays

    def _by_head(self, kind: str) -> list[list[Array]]:
        """Slots ``[cap + B, head_dim]`` of each layer's heads."""
        heads = range(self.num_kv_heads)
        return [[self._arrays[f"{layer}.{head}.{kind}"][0, 0] for head in heads] for layer in range(self.num_layers)]

    def _decoder_caches(self) -> list[str]:
        heads = [f"{layer}.{head}" for layer in range(self.num_layers) for head in range(self.num_kv_heads)]
        return [f"{head}.{kind}" for head in heads for kind in ("key", "value")]

    def _evict_state(self) -> list[str]:
        return [*self._caches(), "log_beta", "positions", "lengths"]

    def _live_inputs(self) -> dict[str, Array]:
        return {**super()._live_inputs(), "lengths": self._arrays["lengths"]}

    def _evict_inputs(self) -> dict[str, Array]:
        return {**super()._evict_inputs(), "live_length": self._live_length}

    def _swap(self, names: list[str]) -> None:
        """A layer's buffer and its heads are one memory, so they change places together."""
        known = [name for name in self._arrays if name.endswith((".key", ".value"))]
        moved = known if set(known) & set(names) else []
        super()._swap([*moved, *(name for name in names if name not in known)])

    def _reset(self) -> None:
        self._forget_rows()
        for array in self._arrays.values():
            array.fill(0)

    def _lengths(self) -> IntArray:
        return self._arrays["lengths"].reshape(self.kept.shape).copy()

    def _kept_positions(self) -> IntArray:
        return self._arrays["positions"].reshape(*self.kept.shape, -1)

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        self.settle()
        most = int(self.kept.max()) + self.live
        key, value = (np.zeros((*self.kept.shape, most, self.head_dim), np.float32) for _ in range(2))
        for kind, table in (("key", key), ("value", value)):
            for layer, heads in enumerate(self._by_head(kind)):
                for head, slots in enumerate(heads):
                    table[layer, head, : len(slots)] = slots[:most]
        return key, value, self._arrays["log_beta"].reshape(*self.kept.shape, -1)[..., :most]

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        self._forget_rows()
        for kind, table in (("key", key), ("value", value)):
            for layer, heads in enumerate(self._by_head(kind)):
                for head, slots in enumerate(heads):
                    rows = table[layer, head, : len(slots)]
                    slots[: len(rows)] = rows
        arrays, most = self._arrays, key.shape[2]
        arrays["log_beta"][:, :most] = log_beta.reshape(self.kept.size, most)
        width = min(most, arrays["positions"].shape[1])
        arrays["positions"][:, :width] = kept.reshape(self.kept.size, most)[:, :width]
        arrays["lengths"][:] = self.kept.reshape(-1)
