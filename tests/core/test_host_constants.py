"""``host.json``: comes back as it was, and damage is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimkv_edge.errors import ArtefactError
from trimkv_edge.host_constants import HostConstants, load_constants

GOOD: dict[str, Any] = {
    "format": 1,
    "masked": -1e4,
    "inverse_frequencies": [1.0, float(np.float32(0.1))],
    "attention_scaling": 1.19,
}


def test_float32_frequencies_survive(tmp_path: Path) -> None:
    frequencies = (10000.0 ** -(np.arange(48) / 48)).astype(np.float32)
    HostConstants(1, -30.0, frequencies.tolist(), 1.5).save(tmp_path / "host.json")
    loaded = load_constants(tmp_path / "host.json")
    assert (loaded.masked, loaded.rotary.attention_scaling) == (-30.0, 1.5)
    assert loaded.rotary.inverse_frequencies.dtype == np.float32
    np.testing.assert_array_equal(loaded.rotary.inverse_frequencies, frequencies)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "not json",
        json.dumps({**GOOD, "masked": "x"}),
        json.dumps({**GOOD, "more": 1}),
        json.dumps({**GOOD, "inverse_frequencies": [1.0, None]}),
        json.dumps({name: value for name, value in GOOD.items() if name != "masked"}),
    ],
)
def test_damage_is_told_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.write_text(content)
    with pytest.raises(ArtefactError, match=r"host\.json cannot be read \(.*export it again") as caught:
        load_constants(path)
    assert "\n" not in str(caught.value)


def test_missing_and_newer_files(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    with pytest.raises(ArtefactError, match="No such file"):
        load_constants(path)
    path.write_text(json.dumps({**GOOD, "format": 2}))
    with pytest.raises(ArtefactError, match="has format 2, but this trimkv-edge reads format 1"):
        load_constants(path)
