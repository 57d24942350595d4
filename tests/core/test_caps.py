"""``caps.json`` as a file: written, read back, and every way in which it can be wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trimkv_edge.caps import Calibration, Occupancy, TradePoint, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError

FOUND = Calibration(
    1,
    "tiny",
    "ab",
    "cd",
    CacheConfig(8, 4, 4, "global", min_per_head=2, threshold=0.25, caps=((16, 8), (8, 8))),
    "float32",
    "sample",
    100,
    50,
    0.99,
    0.995,
    Occupancy([[10.5, 6.0], [7.0, 7.5]], [[12, 7], [8, 8]], [[14, 8], [8, 8]]),
    [TradePoint("p99", 40, 1000, 0.996)],
)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "caps.json")
    assert load_calibration(tmp_path / "caps.json") == FOUND
    assert [path.name for path in tmp_path.iterdir()] == ["caps.json"]


def damaged(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(asdict(FOUND))), **changes}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "schema version None"),
        (json.dumps(damaged(schema_version=2)), "schema version 2, not 1"),
        (json.dumps(damaged(tokens="many")), "not valid at 'tokens'"),
        (json.dumps(damaged(more=1)), "not valid at 'more'"),
        (json.dumps(damaged(cache=asdict(replace(FOUND.cache, caps=None)))), "holds no caps"),
        (json.dumps(damaged(cache={**asdict(FOUND.cache), "caps": [[1, 8], [8, 8]]})), "a cap of 1 entries"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "caps.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=match):
        load_calibration(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json does not exist: make it with trimkv-calibrate"):
        load_calibration(tmp_path / "none.json")
