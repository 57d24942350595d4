"""Packed parts of a program: what a killed export leaves, and that the next one goes on from there to the same file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import PreprocessResult
from factories import gated_model
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.export import executorch
from trimkv_edge.export.executorch import partitioners
from trimkv_edge.export.executorch_parts import PackedParts, part_name
from trimkv_edge.export.executorch_quantize import Late, QuantizedLinear, Zeros, round_weight
from trimkv_edge.export.executorch_weights import LateWeights
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.resume import Numbers, kept_folder, owned

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=6)
BIG, SMALL = b"\x07" * 2**16, b"small"


class Chain(nn.Module):
    """Matrices with something between them that XNNPACK leaves alone, so that each is a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        zeros = Zeros()
        self.model = nn.ModuleDict({name: QuantizedLinear(nn.Linear(512, 512), 4, None, zeros) for name in "abc"})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.values():
            x = layer(x).asin()
        return x


def export(folder: Path, numbers: Numbers) -> tuple[bytes, list[str]]:
    """A program from parts in a folder of its own, and the names of the matrices that were read for it."""
    read = list[str]()

    def make(name: str) -> dict[str, Tensor]:
        read.append(name)
        weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(ord(name)))
        return round_weight(weight, 4)._asdict()

    late = {name: Late(partial(make, name), 100) for name in "abc"}
    exported = torch.export.export(Chain().eval(), (torch.ones(1, 512),))
    with owned(folder, numbers.restart) as kept:
        weights = LateWeights(late, "model", PackedParts(kept, keep=True), numbers.progress)
        with weights.packing():
            program = to_edge_transform_and_lower(
                exported,
                partitioner=partitioners("xnnpack"),
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
        weights.check_used(Chain().model)
        return bytes(program.to_executorch().buffer), read


def killed_export(folder: Path, numbers: Numbers, after: int) -> None:
    """In a child process that kills itself when ``after`` hundred bytes are packed."""

    def progress(done: int, total: int) -> None:
        if done == 100 * after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            export(folder, replace(numbers, progress=progress))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_the_next_export_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    plain, read = export(tmp_path / "plain", Numbers())
    assert read == ["a", "b", "c"]
    killed_export(tmp_path / "kept", Numbers(), after=2)
    steps = list[tuple[int, int]]()
    numbers = Numbers(progress=lambda *at: steps.append(at))
    assert PackedParts(tmp_path / "kept", keep=True).done() == 200
    again, read = export(tmp_path / "kept", numbers)
    assert again == plain
    assert read == ["c"]
    assert steps == [(100, 300), (200, 300), (300, 300)]


def result(*blocks: bytes) -> PreprocessResult:
    store = NamedDataStore()
    for number, block in enumerate(blocks):
        store.add_named_data(f"block{number}", block, 16)
    return PreprocessResult(b"program", {}, store.get_named_data_store_output())


def contents(found: Any) -> tuple[bytes, dict[str, tuple[bytes, int]]]:
    store = found.data_store_output
    blocks = [block if isinstance(block, bytes) else block.to_bytes() for block in store.buffers]
    return found.processed_bytes, {
        key: (blocks[entry.buffer_index], entry.alignment) for key, entry in store.pte_data.items()
    }


WANT = (b"program", {"block0": (BIG, 16), "block1": (SMALL, 16), "block2": (BIG, 16)})


def test_a_kept_part_is_what_was_put(tmp_path: Path) -> None:
    parts = PackedParts(tmp_path, keep=True)
    first = result(BIG, SMALL, BIG)
    parts.put("name", first, 77)
    assert contents(first) == WANT
    assert [type(block).__name__ for block in first.data_store_output.buffers] == ["FileBackedData", "bytes"]
    later = PackedParts(tmp_path, keep=True)
    assert later.done() == 77
    assert contents(later.find("name")) == WANT
    assert later.find("other") is None


@pytest.mark.parametrize("damage", ["cut file", "missing file", "cut record", "other record", "no record"])
def test_a_damaged_part_is_not_used(tmp_path: Path, damage: str) -> None:
    parts = PackedParts(tmp_path, keep=True)
    parts.put("name", result(BIG, SMALL), 77)
    record, block = tmp_path / "name.json", max(tmp_path.glob("*.packed"), key=lambda path: path.stat().st_size)
    actions: dict[str, Callable[[], object]] = {
        "cut file": lambda: os.truncate(block, 9),
        "missing file": block.unlink,
        "cut record": lambda: os.truncate(record, 9),
        "other record": lambda: record.write_text(json.dumps([1])),
        "no record": record.unlink,
    }
    actions[damage]()
    assert (parts.find("name"), parts.done()) == (None, 0)


def test_parts_that_are_not_kept_are_files_for_now_or_memory(tmp_path: Path) -> None:
    for parts in (PackedParts(), PackedParts(tmp_path)):
        made = result(BIG, SMALL)
        parts.put("name", made, 77)
        assert contents(made)[1] == {"block0": (BIG, 16), "block1": (SMALL, 16)}
        assert (parts.find("name"), parts.done()) == (None, 0)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [BIG]
    del made
    assert list(tmp_path.iterdir()) == []


class Affine(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("codes", torch.ones(3, 4))
        self.register_buffer("norm", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.factor, self.codes, self.norm)


def name_of(factor: float = 2.0, width: int = 2, late: float = 1.0, norm: float = 1.0, spec: bytes = b"") -> str:
    module = Affine(factor)
    module.codes.fill_(late)
    module.norm.fill_(norm)
    program = torch.export.export(module, (torch.zeros(width, 4),))
    return part_name(program, [SimpleNamespace(key="k", value=spec)], {"codes"})


def test_the_name_of_a_part_follows_from_all_but_its_late_weights() -> None:
    same = name_of()
    assert name_of() == name_of(late=5.0) == same
    changed = [name_of(factor=3.0), name_of(width=5), name_of(norm=5.0), name_of(spec=b"x")]
    assert len({same, *changed}) == 5


def test_the_folder_follows_from_the_numbers_and_belongs_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path))
    model, scheme, numbers = gated_model("qwen3-gqa"), SCHEMES["8da4w"], Numbers("one")
    assert executorch._kept(model, CONFIG, "xnnpack", scheme, numbers) is None, "too small to keep"
    monkeypatch.setattr(executorch, "RESUMABLE", 0)
    folder = executorch._kept(model, CONFIG, "xnnpack", scheme, numbers)
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    assert folder == executorch._kept(model, CONFIG, "xnnpack", scheme, replace(numbers, restart=True))
    assert folder != executorch._kept(model, CONFIG, "xnnpack", scheme, Numbers("other"))
    assert folder != executorch._kept(model, replace(CONFIG, prefill_chunk=5), "xnnpack", scheme, numbers)
    assert executorch._kept(model, CONFIG, "xnnpack", scheme, Numbers()) is None
    assert executorch._kept(model, CONFIG, "portable", SCHEMES["none"], numbers) is None
    with owned(folder) as mine, owned(folder) as theirs:
        assert (mine, theirs) == (folder, None)
        (folder / "left").write_text("x")
    with owned(folder) as mine:
        assert (folder / "left").exists()
    with owned(folder, restart=True) as mine:
        assert list(folder.iterdir()) == []
    with owned(None) as nothing:
        assert nothing is None
    assert kept_folder("a", 1) != kept_folder("a", 2)
