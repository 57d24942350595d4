"""What lowering must refuse: a graph that its backend cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export.backends.lowering import Delegation, check_job, delegation, lower, staged, whole

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


def test_one_part_with_everything_passes() -> None:
    Delegation(1, 140, {}).check_whole("decode")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Delegation(2, 140, {}), "decode was cut into 2 parts, compute nodes outside them: none"),
        (Delegation(1, 140, {"aten_log": 2}), "into 1 parts, compute nodes outside them: 2 aten_log"),
        (Delegation(0, 0, {"aten_mm": 1}), "into 0 parts"),
    ],
)
def test_a_cut_graph_is_refused(found: Delegation, told: str) -> None:
    with pytest.raises(VerificationError, match=told):
        found.check_whole("decode")


def test_what_a_real_backend_leaves_is_counted() -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log1p(x + x) * x  # XNNPACK has no log1p

    program = torch.export.export(Cut(), (torch.ones(2, 3),))
    lowered = lower({"decode": program}, {"decode": XnnpackPartitioner()})
    found = delegation(lowered, "decode")
    assert (found.partitions, found.nodes, list(found.left.values())) == (2, 2, [1])
    with pytest.raises(VerificationError, match="xnnpack: the graph decode was cut into 2 parts"):
        whole(lowered, "xnnpack", ["decode"])


@pytest.mark.parametrize(
    ("config", "bits", "told"),
    [
        (CONFIG, 8, "--target t starts from float32 weights: use --quant none, and --precision"),
        (CacheConfig(24, 8, 8, kv_dtype="int8"), 32, "leave out --kv-dtype"),
        (CacheConfig(24, 8, 8, lookahead=4), 32, "lookahead is 4"),
    ],
)
def test_settings_that_no_compiler_takes(config: CacheConfig, bits: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_job("t", config, bits)


def test_files_appear_only_when_all_is_right(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "a") as scratch:
            (scratch / "one").write_text("1")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    with staged(tmp_path / "b") as scratch:
        (scratch / "one").write_text("1")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["one"]
