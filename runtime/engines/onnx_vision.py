"""The ONNX Runtime engine for models that read pictures: ids become rows, pictures' rows go in, then it decodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.mixed_engine import spread
from trimkv_edge.pictures import ChunkRows
from trimkv_edge.runtime.engines.mixed import KEPT_ENCODERS, MixedArtefactEngine
from trimkv_edge.runtime.engines.onnx import Array, OnnxEngine
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine


class _Chunk(NamedTuple):
    """Memory that chunks of one length are read from, and the binding that makes rows of ids."""

    ids: Array
    embeddings: Array
    positions: Array
    deepstack: Array
    embed: Any


class OnnxVisionEngine(MixedArtefactEngine, OnnxEngine):
    """Runs the ``onnx`` target of an artefact whose model reads pictures; arguments as for its second base.

    The vision encoder is loaded with the first picture.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._encoders: dict[tuple[int, int], Any] = {}
        super().__init__(*args, **settings)
        self._embedder = self._load("embed", self.threads or 1)

    def _open_cache(self) -> None:
        self._rows: dict[int, _Chunk] = {}
        super()._open_cache()

    def _decoder_inputs(self) -> dict[str, Array]:
        return {name: array for name, array in super()._decoder_inputs().items() if name != "position"}

    def _decoder_binding(self, count: int) -> Any:
        chunk = self._rows.get(count) or self._new_chunk(count)
        self._rows[count] = chunk
        plain = {"embeddings": chunk.embeddings, "positions": chunk.positions, **self._decoder_inputs()}
        if self.vision.features:
            plain["deepstack"] = chunk.deepstack
        return self._bind_decoder(plain, count)

    def _new_chunk(self, count: int) -> _Chunk:
        features, width = self.picture_shape
        ids, embeddings = np.zeros((1, count), np.int64), np.zeros((1, count, width), np.float32)
        embed = self._embedder.io_binding()
        self._attach(embed, "input_ids", ids)
        self._attach(embed, "embeddings", embeddings, output=True)
        return _Chunk(
            ids, embeddings, np.zeros((3, count), np.int64), np.zeros((features, count, width), np.float32), embed
        )

    def _forward_rows(self, ids: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        binding = self._binding(ids.size)
        chunk = self._rows[ids.size]
        chunk.ids[0] = ids
        self._embedder.run_with_iobinding(chunk.embed)
        chunk.positions[:] = rows.positions
        spread(rows, chunk.embeddings[0], chunk.deepstack)
        return self._run_step(binding, ids.size, self.seen, live)

    def _encode(self, size: tuple[int, int], pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
        session = self._encoders.get(size)
        if session is None:
            bytes_each = self._file("vision_data").stat().st_size
            if bytes_each * (len(self._encoders) + 1) > KEPT_ENCODERS:
                self._encoders.clear()
            session = self._encoders[size] = self._load(f"vision-{size[0]}x{size[1]}", self.threads or 1)
        rows, features = session.run(None, {"pixel_values": pixels})
        return rows, features


class OnnxPooledVisionEngine(OnnxVisionEngine, OnnxPooledEngine):
    """The same where heads share a budget."""
