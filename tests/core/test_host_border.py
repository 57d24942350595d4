"""What enters and leaves a graph of integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trimkv_edge.errors import ArtefactError
from trimkv_edge.host_border import Border, Port, load_borders, save_borders


def test_floats_pass_as_they_are() -> None:
    numbers = np.array([1.5, -0.25], np.float32)
    port = Port("hidden", "float32")
    assert port.store(numbers) is numbers
    assert port.read(numbers) is numbers


def test_integers_are_rounded_to_even_and_cut() -> None:
    port = Port("mask", "int8", 0.5, 3)
    numbers = np.array([0.0, 0.25, 0.75, 1.0, -1.0, 1000.0, -1000.0], np.float32)
    # n / 0.5 + 3: 3, 3.5 -> 0 rounds down to even, 1.5 -> 2, 5, 1, too much, too little.
    assert port.store(numbers).tolist() == [3, 3, 5, 5, 1, 127, -128]
    assert port.store(numbers).dtype == np.int8
    assert port.read(np.array([3, 5, 127, -128], np.int8)).tolist() == [0.0, 1.0, 62.0, -65.5]
    assert port.read(np.array([3], np.int8)).dtype == np.float32


def test_what_a_graph_gave_comes_back_as_the_same_integers() -> None:
    stored = np.arange(-32768, 32768, dtype=np.int16)
    port = Port("past.0.key", "int16", 0.00013, -7)
    np.testing.assert_array_equal(port.store(port.read(stored)), stored)


def test_borders_survive_their_file(tmp_path: Path) -> None:
    borders = {"decode": Border([Port("a", "int8", 0.1, 2), Port("b", "float32")], [Port("c", "int16", 1e-9)])}
    save_borders(borders, tmp_path / "b.json")
    assert load_borders(tmp_path / "b.json") == borders
    (tmp_path / "b.json").write_text('{"decode": {"inputs": []}}')
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_borders(tmp_path / "b.json")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_borders(tmp_path / "none.json")
