"""What enters and leaves a graph of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.host_border import Border, Encoding, Port, load_borders, save_borders


def test_floats_pass_as_they_are() -> None:
    numbers = np.array([1.5, -0.25], np.float32)
    encoding = Encoding("float32")
    assert encoding.store(numbers) is numbers
    assert encoding.real(numbers) is numbers


@pytest.mark.parametrize(
    ("encoding", "real", "stored", "back"),
    [
        # 0.5 and 1.5 steps go to the even neighbour; what is outside takes the end of the range.
        (Encoding("uint8", 0.5, 10), [0, 0.25, 0.75, -5, -9, 200], [10, 10, 12, 0, 0, 255], [0, 0, 1, -5, -5, 122.5]),
        (Encoding("uint16", 2.0, 0), [-1, 3, 131070, 1e9], [0, 2, 65535, 65535], [0, 4, 131070, 131070]),
        (Encoding("int16", 0.25, -4), [0, 1e9, -1e9], [-4, 32767, -32768], [0, 8192.75, -8191]),
        # Of steps and zero point together, steps are rounded: 0.5 becomes 0 and 1.5 becomes 2, then 3 is added.
        (
            Encoding("int8", 0.5, 3),
            [0.0, 0.25, 0.75, 1.0, -1.0, 1000.0, -1000.0],
            [3, 3, 5, 5, 1, 127, -128],
            [0.0, 0.0, 1.0, 1.0, -1.0, 62.0, -65.5],
        ),
    ],
)
def test_numbers(encoding: Encoding, real: list[float], stored: list[int], back: list[float]) -> None:
    kept = encoding.store(np.array(real, np.float32))
    assert (kept.dtype.name, kept.tolist()) == (encoding.dtype, stored)
    assert encoding.real(kept).dtype == np.float32
    assert encoding.real(kept).tolist() == back


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16"])
def test_every_integer_comes_back(dtype: str) -> None:
    """What a graph gave is the same after a host has turned it into float32 and back, for awkward scales too."""
    limits = np.iinfo(dtype)
    every = np.arange(limits.min, limits.max + 1).astype(dtype)
    for scale in (1 / 3, 1.17e-4, 7.3):
        encoding = Encoding(dtype, scale, limits.max // 3)
        np.testing.assert_array_equal(encoding.store(encoding.real(every)), every)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (("int4", 1.0, 0), "must be one of float32, int8, int16, uint8, uint16"),
        (("uint8", 0.0, 0), "must be above 0"),
        (("int8", float("nan"), 0), "must be above 0"),
        (("int16", float("inf"), 0), "must be above 0"),
        (("uint8", 1.0, 256), "which uint8 does not hold"),
        (("uint8", 1.0, -1), "which uint8 does not hold"),
        (("int8", 1.0, 128), "which int8 does not hold"),
        (("float32", 2.0, 0), "must have 1, 0"),
    ],
)
def test_what_is_no_encoding(fields: tuple[str, float, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Encoding(*fields)


def test_borders_survive_their_file(tmp_path: Path) -> None:
    borders = {
        "decode": Border([Port("int8", 0.1, 2, name="a"), Port("float32", name="b")], [Port("int16", 1e-9, name="c")])
    }
    save_borders(borders, tmp_path / "b.json")
    assert load_borders(tmp_path / "b.json") == borders


_PORT = '{"name": "a", "dtype": "int8", "scale": 0.1, "zero_point": 2}'


def test_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"decode": {"inputs": [' + _PORT + '], "outputs": []}}')
    assert load_borders(tmp_path / "b.json") == {"decode": Border([Port("int8", 0.1, 2, name="a")], [])}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"decode": {"inputs": []}}', "Field required"),
        ("{", "Invalid JSON"),
        ('{"decode": {"inputs": [' + _PORT.replace("int8", "int3") + '], "outputs": []}}', "must be one of float32"),
        ('{"decode": {"inputs": [' + _PORT.replace("0.1", '"0.1"') + '], "outputs": []}}', "valid number"),
        ('{"decode": {"inputs": [' + _PORT.replace("{", '{"x": 1, ') + '], "outputs": []}}', "[Uu]nexpected"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_border(text: Any, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises(ArtefactError, match=f"b.json cannot be read \\(.*{told}"):
        load_borders(tmp_path / "b.json")
