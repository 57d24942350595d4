"""Pages of mapped files, counted by the kernel."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import psutil
import pytest

from trimkv_edge.runtime.mapped import release_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SIZE = 8 * 2**20


def resident(path: Path) -> int:
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(mapping.rss for mapping in maps if mapping.path == str(path))


def mapped(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        made = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert sum(made[:: mmap.PAGESIZE]) == 0  # every page was read
    assert resident(path) == SIZE
    return made


def test_pages_leave_and_come_back(tmp_path: Path) -> None:
    with mapped(tmp_path / "weights") as weights, mapped(tmp_path.parent / "elsewhere") as elsewhere:
        assert release_mapped(tmp_path) == SIZE
        assert resident(tmp_path / "weights") == 0
        assert resident(tmp_path.parent / "elsewhere") == SIZE
        assert weights[1000:1010] == elsewhere[1000:1010] == bytes(value % 256 for value in range(1000, 1010))


def test_what_was_written_stays(tmp_path: Path) -> None:
    with mapped(tmp_path / "weights") as weights:
        weights[5000:5003] = b"new"
        assert release_mapped(tmp_path) == 0
        assert weights[5000:5003] == b"new"
