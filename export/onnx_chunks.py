"""What a traced decoder reads of a chunk: token ids and a position, or rows of a mixed stream."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trimkv_edge.export.onnx_attention import OnnxAttention
from trimkv_edge.export.onnx_pooled import PooledAttention
from trimkv_edge.models.gated import GatedModel, chunk_positions
from trimkv_edge.models.pictures import GatedVisionModel


class Reader(Protocol):
    """Inputs of a chunk and how the model reads them."""

    @property
    def dynamic(self) -> list[int | None]:
        """Of each input, the axis that is T; None: none is."""

    def example(self, count: int) -> dict[str, Tensor]:
        """Inputs of a chunk of ``count`` tokens, by name; the first has T on axis 1."""

    def __call__(self, chunk: list[Tensor], backend: OnnxAttention | PooledAttention) -> Tensor:
        """Inputs in that order -> logits ``[1, 1, vocab_size]``."""


class TextReader:
    """``input_ids`` int64 ``[1, T]`` and ``position`` int64 ``[1]`` of the first."""

    def __init__(self, model: GatedModel) -> None:
        self.model = model

    @property
    def dynamic(self) -> list[int | None]:
        return [1, None]

    def example(self, count: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.zeros(1, count, dtype=torch.int64),
            "position": torch.zeros(1, dtype=torch.int64),
        }

    def __call__(self, chunk: list[Tensor], backend: OnnxAttention | PooledAttention) -> Tensor:
        ids, position = chunk
        logits: Tensor = self.model(ids, chunk_positions(position, ids.shape[1]), backend)
        return logits


class RowsReader:
    """``embeddings`` float32 ``[1, T, hidden_size]``, ``positions`` int64 ``[3, T]`` and, if the model has DeepStack
    features, ``deepstack`` float32 ``[features, T, hidden_size]``."""

    def __init__(self, model: GatedVisionModel) -> None:
        self.model, self.features = model, model.features

    @property
    def dynamic(self) -> list[int | None]:
        return [1, 1, 1] if self.features else [1, 1]

    def example(self, count: int) -> dict[str, Tensor]:
        width = self.model.config.hidden_size
        rows = {
            "embeddings": torch.zeros(1, count, width),
            "positions": torch.zeros(3, count, dtype=torch.int64),
        }
        return rows | ({"deepstack": torch.zeros(self.features, count, width)} if self.features else {})

    def __call__(self, chunk: list[Tensor], backend: OnnxAttention | PooledAttention) -> Tensor:
        embeddings, positions = chunk[:2]
        deepstack = chunk[2] if self.features else embeddings.new_zeros(0)
        return self.model.decode_rows(embeddings, positions, deepstack, backend)
