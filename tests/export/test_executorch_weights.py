"""What exporting to ExecuTorch leaves in memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from executorch.exir.tensor import TensorSpec
from factories import gated_model

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.executorch import export_executorch
from trimkv_edge.export.executorch_quantize import Zeros
from trimkv_edge.export.heap import give_back
from trimkv_edge.export.quantization import SCHEMES


def planned_buffers() -> list[TensorSpec]:
    """Buffers that programs were planned with; other tests of this process may hold some. The list keeps them, so that
    none of them goes while this test counts."""
    return [x for x in gc.get_objects() if type(x) is TensorSpec and getattr(x, "storage", None) is not None]


@pytest.mark.parametrize("scheme", ["none", "8da4w"])
def test_no_buffer_of_a_program_stays(tmp_path: Path, scheme: str) -> None:
    give_back()
    before = planned_buffers()
    model = gated_model("qwen3-gqa")
    export_executorch(model, CacheConfig(budget=24, buffer=8, prefill_chunk=6), tmp_path, scheme=SCHEMES[scheme])
    give_back()
    assert {id(x) for x in planned_buffers()} == {id(x) for x in before}


def test_zeros_of_a_shape_are_one_memory() -> None:
    zeros = Zeros()
    one, other = zeros((3, 5), torch.int8), zeros((3, 5), torch.int8)
    assert one is not other
    assert one.data_ptr() == other.data_ptr() != zeros((3, 5), torch.float32).data_ptr()
    assert (one.dtype, one.shape, one.count_nonzero()) == (torch.int8, (3, 5), 0)
