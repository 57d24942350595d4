"""Memory between two stages."""

from __future__ import annotations

import sys

import psutil
import pytest

from trimkv_edge.export.heap import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_goes_back_though_something_behind_it_stays() -> None:
    process = psutil.Process()
    blocks = [bytes(4000) for _ in range(40_000)]
    last = bytes(4000)
    blocks.clear()
    before = process.memory_info().rss
    give_back()
    assert before - process.memory_info().rss > 80 * 2**20
    assert len(last) == 4000


def test_cycles_are_collected() -> None:
    class Node:
        count = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Node.count += 1

    Node()
    give_back()
    assert Node.count == 1
