"""Where an export's caps come from, and what is refused before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimkv_edge.budget import cache_bytes
from trimkv_edge.caps import CAPS_FILE, Calibration, Occupancy, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError
from trimkv_edge.export.caps import calibrate_within, caps_from_file
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.manifest import file_sha256, load_manifest
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session

CAPS = ((24, 24), (96, 24), (16, 16), (40, 32))
CACHE = CacheConfig(32, 16, 16, "global", caps=CAPS)
SOURCE = find_source("tiny")
GATES = Path(SOURCE.gates["rg10"])


def write(path: Path, **changes: Any) -> Path:
    numbers = [[0.0] * 2] * 4
    whole = [[0] * 2] * 4
    known = dict(cache=CACHE, weights_sha256=SOURCE.weights_sha256(), gates_sha256=file_sha256(GATES))
    found = {**known, **changes}
    Calibration(
        schema_version=1,
        model="tiny",
        dtype="float32",
        text="",
        tokens=0,
        held_out_tokens=0,
        target=0.9,
        agreement=0.9,
        occupancy=Occupancy(numbers, whole, whole),
        trade=[],
        **found,
    ).save(path)
    return path


def request(tmp_path: Path, caps: Path | str | None, **more: Any) -> ExportRequest:
    settings = dict(budget="32", buffer=16, prefill_chunk=16, policy="global", targets=("onnx",))
    return ExportRequest("tiny", tmp_path / "out", caps=None if caps is None else str(caps), **{**settings, **more})


def test_caps_of_a_file_end_up_in_the_artefact_and_run(tmp_path: Path) -> None:
    plan = plan_export(request(tmp_path, write(tmp_path / "caps.json")))
    assert plan.gates == ("rg10", GATES)
    assert plan.config == CACHE
    run_export(plan, lambda line: None)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.cache == CACHE
    slots = sum(map(sum, CAPS)) + 8 * 16
    assert manifest.bytes.cache == slots * 2 * 64 * 4 + 8 * ((96 + 16) * 4 + 96 * 8 + 8)
    assert load_calibration(tmp_path / "out" / CAPS_FILE).cache == CACHE
    assert CAPS_FILE in manifest.files
    parity = manifest.targets["onnx"].parity
    assert (parity["survivor_mismatches"], parity["greedy_mismatches"]) == (0, 0)
    assert parity["events"] >= 5
    artefact = Artefact.load(tmp_path / "out")
    session = Session.open(artefact)
    session.feed(artefact.tokenizer.encode("The sky is blue. " * 60))  # type: ignore[union-attr]
    assert len(list(session.generate(40))) == 40
    statistics = session.statistics()
    assert statistics.live_entries <= 48
    assert statistics.cache_bytes == manifest.bytes.cache
    assert session.engine.entries <= 32 * 8 + 16 * 8


def test_calibration_at_export_fits_a_budget_in_bytes(tmp_path: Path) -> None:
    lines: list[str] = []
    loaded = load_model(SOURCE, "rg10")
    config = CacheConfig(48, 16, 16, "global")
    found = calibrate_within(loaded, SOURCE, SOURCE.shape(), config, budget="250KB", target=0.9, report=lines.append)
    assert cache_bytes(SOURCE.shape(), found.cache, "float32") <= 250 * 1024
    assert found.cache.budget < 48
    assert found.agreement >= 0.9
    assert any("trying" in line for line in lines)
    with pytest.raises(BudgetError, match="no shared budget fits 100KB"):
        calibrate_within(loaded, SOURCE, SOURCE.shape(), config, budget="100KB", target=0.5, report=lines.append)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(buffer=8, prefill_chunk=8), "was made for buffer 16, but 8 is wanted: give --buffer 16 or calibrate"),
        (dict(budget="40"), "was made for budget 32, but 40 is wanted"),
        (dict(policy="layer"), "was made for policy global, but layer"),
        (dict(min_per_head=2), "was made for min per head 0, but 2"),
        (dict(threshold=0.5), "was made for threshold 0.0, but 0.5"),
        (dict(caps_target=0.9), "--caps-target is for caps that the export calibrates"),
        (dict(policy="trimkv"), "--caps is for policies whose heads share a budget"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_export(request(tmp_path, write(tmp_path / "caps.json"), **changes))


def test_caps_of_another_model_are_refused(tmp_path: Path) -> None:
    wide = replace(CACHE, caps=tuple((*heads, 8) for heads in CAPS), budget=24)
    with pytest.raises(ConfigError, match="4 layers x 3 KV heads, but the model has 4 x 2"):
        caps_from_file(write(tmp_path / "a.json", cache=wide), replace(wide, caps=None), SOURCE)
    with pytest.raises(ConfigError, match=r"made for other weights \(tiny\)"):
        plan_export(request(tmp_path, write(tmp_path / "b.json", weights_sha256="77")))
    plan = plan_export(request(tmp_path, write(tmp_path / "c.json"), gates="rg"))
    with pytest.raises(ConfigError, match=r"made with other gates than .*rg\.safetensors"):
        run_export(plan, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_budget_in_bytes_limits_what_caps_take(tmp_path: Path) -> None:
    caps = write(tmp_path / "caps.json")
    assert plan_export(request(tmp_path, caps, budget="1MB")).config == CACHE
    with pytest.raises(BudgetError, match=r"need a cache of 209.6 KiB, more than the budget of 200.0 KiB"):
        plan_export(request(tmp_path, caps, budget="200KB"))
