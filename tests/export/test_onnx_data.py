"""The weights file: what is read back, what an interruption leaves, and that the next export goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from trimkv_edge.export import onnx_data
from trimkv_edge.export.onnx_data import save_with_data
from trimkv_edge.export.resume import Numbers

COUNT = 6


class Stop(Exception):
    """Stands for Ctrl-C, a full disk, a lost connection."""


def model(made: list[int], fail_at: int | None = None, scale: float = 1.0) -> ir.Model:
    """Six lazy initialisers of 2 KiB and one small one; ``made`` lists which were computed."""

    def compute(index: int) -> Callable[[], ir.Tensor]:
        def run() -> ir.Tensor:
            if index == fail_at:
                raise Stop
            made.append(index)
            return ir.Tensor(np.full(512, index * scale, np.float32), name=f"w{index}")

        return run

    values = [
        ir.Value(
            name=f"w{index}",
            const_value=ir.LazyTensor(compute(index), ir.DataType.FLOAT, ir.Shape([512]), name=f"w{index}"),
        )
        for index in range(COUNT)
    ]
    small = ir.Value(name="small", const_value=ir.Tensor(np.arange(3, dtype=np.int64), name="small"))
    graph = ir.Graph([], [], nodes=[], initializers=[*values, small], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def contents(folder: Path) -> dict[str, np.ndarray]:
    loaded = onnx.load(folder / "m.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}


@pytest.fixture
def resumable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(onnx_data, "RESUMABLE", 0)
    monkeypatch.setattr(onnx_data, "_SYNC_EVERY", 1)
    out = tmp_path / "out"
    out.mkdir()
    return out


def check(folder: Path, scale: float = 1.0) -> None:
    found = contents(folder)
    assert sorted(found) == ["small", *(f"w{index}" for index in range(COUNT))]
    for index in range(COUNT):
        np.testing.assert_array_equal(found[f"w{index}"], np.full(512, index * scale, np.float32))
    np.testing.assert_array_equal(found["small"], np.arange(3))


def test_the_file_holds_every_large_initialiser(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    save_with_data(model([]), tmp_path / "m.onnx", "m.data", Numbers(progress=lambda *at: seen.append(at)))
    check(tmp_path)
    # Page by page, the last one cut: 5 x 4096 + 2048.
    assert (tmp_path / "m.data").stat().st_size == 22528
    assert [done for done, _ in seen] == [index * 4096 + 2048 for index in range(COUNT)]
    assert {total for _, total in seen} == {22528}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.data", "m.onnx"]


def test_the_next_export_goes_on_where_one_stopped(resumable: Path) -> None:
    made: list[int] = []
    lines: list[str] = []
    with pytest.raises(Stop):
        save_with_data(model(made, fail_at=4), resumable / "m.onnx", "m.data", Numbers("same", say=lines.append))
    assert list(resumable.iterdir()) == []
    assert (made, lines) == ([0, 1, 2, 3], [])
    made.clear()
    save_with_data(model(made), resumable / "m.onnx", "m.data", Numbers("same", say=lines.append))
    assert made == [4, 5]
    assert lines == ["going on where an interrupted export stopped: 14.0 KiB of 22.0 KiB are packed"]
    check(resumable)
    assert not any(path.is_dir() for path in (resumable.parent / "cache" / "exports").iterdir())


@pytest.mark.parametrize("change", ["restart", "other numbers", "cut file", "damaged journal"])
def test_what_cannot_be_trusted_is_made_again(resumable: Path, change: str) -> None:
    with pytest.raises(Stop):
        save_with_data(model([], fail_at=4), resumable / "m.onnx", "m.data", Numbers("same"))
    (kept,) = (path for path in (resumable.parent / "cache" / "exports").iterdir() if path.is_dir())
    if change == "cut file":
        with (kept / "m.data").open("r+b") as file:
            file.truncate(100)
    if change == "damaged journal":
        (kept / "journal.json").write_text("[")
    made: list[int] = []
    numbers = Numbers("other" if change == "other numbers" else "same", restart=change == "restart")
    save_with_data(model(made, scale=2.0), resumable / "m.onnx", "m.data", numbers)
    assert made == list(range(COUNT))
    check(resumable, scale=2.0)


def test_two_exports_at_once_do_not_meet(resumable: Path) -> None:
    inner: list[int] = []
    second = resumable.parent / "second"
    second.mkdir()

    def meanwhile(done: int, total: int) -> None:
        if not inner:
            save_with_data(model(inner, scale=3.0), second / "m.onnx", "m.data", Numbers("same"))

    save_with_data(model([]), resumable / "m.onnx", "m.data", Numbers("same", progress=meanwhile))
    assert inner == list(range(COUNT))
    check(resumable)
    check(second, scale=3.0)
