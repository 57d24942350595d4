"""The ExecuTorch engine for models that read pictures: ids become rows, pictures' rows go in, then it decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.errors import ArtefactError
from trimkv_edge.mixed_engine import spread
from trimkv_edge.pictures import ChunkRows
from trimkv_edge.runtime.engines.executorch import (
    ExecuTorchEngine,
    ExecuTorchProgram,
    does_not_load,
    native_log,
)
from trimkv_edge.runtime.engines.executorch_pooled import ExecuTorchPooledEngine
from trimkv_edge.runtime.engines.mixed import KEPT_ENCODERS, MixedArtefactEngine


class _Chunk(NamedTuple):
    """Memory that a chunk is read from, and tensors that share it: of the ids, and of what ``forward`` takes."""

    ids: IntArray
    embeddings: FloatArray
    positions: IntArray
    deepstack: FloatArray
    embed: tuple[Any, ...]
    forward: tuple[Any, ...]


class _VisionProgram(MixedArtefactEngine, ExecuTorchProgram):
    """Both kinds; the vision encoder is loaded with the first picture."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._encoders: Any = None
        super().__init__(*args, **settings)
        self._step = self._new_chunk(1)

    @property
    def _wanted(self) -> tuple[str, ...]:
        return (*super()._wanted, "embed")

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), **self._picture_facts()}

    def _picture_facts(self) -> dict[str, Any]:
        """Those that the vision encoder's program has too."""
        features, width = self.picture_shape
        return {
            "get_trimkv_hidden_size": width,
            "get_trimkv_features": features,
            "get_trimkv_picture_sizes": [side for size in self.vision.sizes for side in size],
        }

    def _new_chunk(self, count: int) -> _Chunk:
        features, width = self.picture_shape
        ids, positions = np.zeros((1, count), np.int64), np.zeros((3, count), np.int64)
        embeddings = np.zeros((1, count, width), np.float32)
        deepstack = np.zeros((features, count, width), np.float32)
        read = [embeddings, positions, *([deepstack] if features else []), self._live]
        tensors = tuple(map(self._torch.from_numpy, read))
        return _Chunk(ids, embeddings, positions, deepstack, (self._torch.from_numpy(ids),), tensors)

    def _forward_rows(self, ids: IntArray, rows: ChunkRows, live: int) -> FloatArray:
        chunk = self._step if ids.size == 1 else self._new_chunk(ids.size)
        chunk.ids[0] = ids
        # Copied: it lies in memory that ``forward`` computes in.
        chunk.embeddings[:] = self._run("embed", chunk.embed)[0].numpy()
        chunk.positions[:] = rows.positions
        spread(rows, chunk.embeddings[0], chunk.deepstack)
        self._live[0] = live
        return self._run_step(chunk.forward, ids.size)

    def _encode(self, size: tuple[int, int], pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
        name = f"encode_{size[0]}x{size[1]}"
        if name not in self._methods:
            self._load_encoder(name)
        rows, *features = (found.numpy().copy() for found in self._run(name, (self._torch.from_numpy(pixels),)))
        return rows, features[0] if features else np.zeros((0, *rows.shape), np.float32)

    def _load_encoder(self, name: str) -> None:
        path = self._file("vision")
        loaded = [method for method in self._methods if method.startswith("encode_")]
        if (len(loaded) + 1) * path.stat().st_size > KEPT_ENCODERS:
            for method in loaded:
                del self._methods[method]
        with native_log() as log:
            try:
                self._encoders = self._encoders or self._open_encoders(path)
                self._methods[name] = self._encoders.load_method(name)
            except RuntimeError as error:
                raise does_not_load(path, log, error) from error

    def _open_encoders(self, path: Path) -> Any:
        program = self._binding._load_program(
            str(path), program_verification=self._binding.Verification.InternalConsistency
        )
        names = {program.get_method_name(index) for index in range(program.num_methods())}
        for name, want in self._picture_facts().items():
            values = program.load_method(name).call(()) if name in names else []
            if values != (want if isinstance(want, list) else [want]):
                raise ArtefactError(
                    f"{path} says {name} = {values}, but the manifest means {want}: "
                    "files of two artefacts are mixed, export it again"
                )
        return program


class ExecuTorchVisionEngine(_VisionProgram, ExecuTorchEngine):
    """Runs the ``executorch`` target of an artefact whose model reads pictures; arguments as for its second base."""


class ExecuTorchPooledVisionEngine(_VisionProgram, ExecuTorchPooledEngine):
    """The same where heads share a budget."""
