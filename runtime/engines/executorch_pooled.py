"""The ExecuTorch engine where heads share a budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.pooled_engine import PooledEngine
from trimkv_edge.runtime.engines.executorch import ExecuTorchProgram


class ExecuTorchPooledEngine(PooledEngine, ExecuTorchProgram):
    """Runs the ``executorch`` target of an artefact whose heads share a budget; arguments as for its second base."""

    @property
    def _wanted(self) -> tuple[str, ...]:
        return (*super()._wanted, "read_lengths", "write_lengths")

    def _facts(self) -> dict[str, Any]:
        config = self.config
        return {
            **super()._facts(),
            "get_trimkv_caps": self._caps.tolist(),
            "get_trimkv_min_per_head": config.min_per_head,
            "get_trimkv_threshold": config.threshold,
            "get_trimkv_pools": self.num_layers if config.policy == "layer" else 1,
        }

    @property
    def _caps(self) -> IntArray:
        return np.array(self.config.caps or (), np.int64).reshape(-1)

    def _evict(self, seen: int) -> None:
        self.settle()
        self._seen[0], self._live[0] = seen, self.live
        self._run("evict", (*self._evict_inputs, self._chunk_inputs[1]))

    def _lengths(self) -> IntArray:
        lengths: IntArray = self._run("read_lengths")[0].numpy()
        return lengths.reshape(self.kept.shape).copy()

    def _starts(self, width: int) -> range:
        """First slots of the blocks that cover ``width`` slots; the last block may end behind them."""
        return range(0, width, self._block)

    def _read(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        self.settle()
        starts = self._starts(int(self.kept.max()) + self.live)
        shape = (*self.kept.shape, len(starts) * self._block)
        key, value = (np.empty((*shape, self.head_dim), np.float32) for _ in range(2))
        log_beta = np.empty(shape, np.float32)
        for start in starts:
            self._seen[0] = start
            for whole, rows in zip((key, value, log_beta), self._run("read_state", self._evict_inputs), strict=True):
                part = whole[:, :, start : start + self._block]
                part[...] = rows.numpy().reshape(part.shape)
        return key, value, log_beta

    def _write(
        self, key: FloatArray, value: FloatArray, log_beta: FloatArray, kept: IntArray, seen: int, live: int
    ) -> None:
        tensor, rows, width = self._torch.from_numpy, self._rows, key.shape[2]
        row, caps = np.arange(rows)[:, None], self._caps[:, None]
        tables = [array.reshape(rows, width, *array.shape[3:]) for array in (key, value, log_beta)]
        for start in self._starts(width):
            # Behind its last slot a head has none: the program writes that one again, with what lies there.
            slot = np.minimum(start + np.arange(self._block), caps + self.config.buffer - 1)
            key, value, log_beta = (array[row, np.minimum(slot, width - 1)] for array in tables)
            self._seen[0] = start
            block = (key, value, log_beta.reshape(-1, 1))
            self._run("write_state", (*self._evict_inputs, *map(tensor, block)))
        positions = np.zeros((rows, caps.max()), np.int64)
        known = min(width, positions.shape[1])
        positions[:, :known] = kept.reshape(rows, width)[:, :known]
        self._run("write_kept", (tensor(positions),))
        self._run("write_lengths", (tensor(self.kept.reshape(-1, 1).copy()),))
        self._gate_rows.waiting = 0
