"""Graphs cut between layers: parts in turn give what the whole gives, on the CPU and in Qualcomm's emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from backend_artefact import compiled, job_for, need
from factories import gated_model, random_tokens
from onnx_artefact import Artefact, feed, make_manifest, same, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.export.backends import hexagon_shards
from trimkv_edge.export.backends.hexagon import export_hexagon
from trimkv_edge.export.backends.hexagon_shards import CONTEXT_BYTES, cut, shards_needed
from trimkv_edge.export.host_evicted import export_host_evicted
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.engines.qnn_emulator import QnnEmulatorEngine

need("npu:hexagon")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
LAYERS = 3


def model(case: str = "qwen3-gqa") -> GatedModel:
    return spread_gates(gated_model(case, num_hidden_layers=LAYERS))


def sharded(folder: Path, precision: str, shards: int | None) -> Artefact:
    folder.mkdir(exist_ok=True)
    job = job_for(model(), CONFIG, folder, precision)
    object.__setattr__(job, "shards", shards)
    target = export_hexagon(job)
    return Artefact(folder, job.model, make_manifest(job.model, CONFIG, target), target)


@pytest.mark.parametrize("case", ["qwen3-gqa", "phi3-partial-rotary", "llama-gqa"])
def test_parts_on_the_cpu_give_what_the_whole_gives(case: str, tmp_path: Path) -> None:
    export_host_evicted(model(case), CONFIG, tmp_path)
    whole = tmp_path / "host_prefill.onnx"
    given, random = onnxruntime.InferenceSession(str(whole)), np.random.default_rng(0)
    known = {one.name: random.standard_normal(one.shape).astype(np.float32) for one in given.get_inputs()}
    want = dict(zip([one.name for one in given.get_outputs()], given.run(None, known), strict=True))
    parts = cut(whole, LAYERS, 2)
    assert len(parts) == 2
    layers = [{0}, {1, 2}]
    for path, own in zip(parts, layers, strict=True):
        part = onnxruntime.InferenceSession(str(path))
        names = {one.name for one in part.get_inputs()}
        assert {int(name.split(".")[1]) for name in names if name.startswith("past.")} == own
        out = dict(
            zip(
                [one.name for one in part.get_outputs()],
                part.run(None, {name: known[name] for name in names}),
                strict=True,
            )
        )
        known |= out
    assert set(want) <= set(known)
    for name, rows in want.items():
        np.testing.assert_array_equal(known[name], rows, err_msg=name)


@pytest.mark.parametrize(("precision", "shards"), [("fp16", 3), ("a16w8", 2)])
def test_parts_in_the_emulator_give_what_the_whole_gives(precision: str, shards: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = compiled("npu:hexagon", model(), CONFIG, tmp_path / "whole", precision)
    parts = sharded(tmp_path / "parts", precision, shards)
    roles = {
        f"{graph}{part}{kind}"
        for graph in ("decode", "prefill")
        for part in ("", "_2", "_3")[:shards]
        for kind in ("", "_context")
    }
    assert set(parts.target.files) == roles | {"info", "constants", "embedding"}
    engines = [QnnEmulatorEngine(one.folder, one.manifest, one.target, profile=True) for one in (whole, parts)]
    tokens = random_tokens(24 + 8 * 3)
    want, got = (feed(engine, tokens, (8, 3, 1)) for engine in engines)
    assert same(want, got)
    np.testing.assert_array_equal(engines[0].survivors(), engines[1].survivors())
    assert {row.operator for row in engines[1].profile_rows()}


def test_as_few_as_hold_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = CONTEXT_BYTES // 8
    for layer, head, layers, shards in [
        (share, 0, 8, 1),
        (share, share, 7, 1),
        (share, share, 8, 2),  # the output layer beside four
        (share, 4 * share, 8, 2),
        (share, 5 * share, 8, 3),
        (share, 0, 9, 2),
        (9 * share, 0, 4, 4),  # no part is smaller than a layer
    ]:
        assert shards_needed(layer, head, layers) == shards
    linear = LAYERS * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96) + 64 * 320  # q, o; k, v; the MLP; the output layer
    gates = LAYERS * (64 * 24 + 24 * 2)
    monkeypatch.setattr(hexagon_shards, "CONTEXT_BYTES", 2 * (linear + gates))
    assert "decode_2" not in sharded(tmp_path / "one", "fp16", None).target.files
    monkeypatch.setattr(hexagon_shards, "CONTEXT_BYTES", 2 * (linear + gates) - 1)
    assert "decode_2" in sharded(tmp_path / "two", "fp16", None).target.files


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    for shards in (0, 4):
        with pytest.raises(ConfigError, match=f"--shards is {shards}, but 3 layers can be cut into 1 to 3 parts"):
            sharded(tmp_path, "fp16", shards)
    assert not list(tmp_path.iterdir())


def test_parts_of_two_artefacts_are_refused(tmp_path: Path) -> None:
    parts = sharded(tmp_path / "parts", "fp16", 2)
    for kind in ("", "_context"):
        del parts.target.files[f"prefill_2{kind}"]
    with pytest.raises(ArtefactError, match="one is missing: export it again"):
        QnnEmulatorEngine(parts.folder, parts.manifest, parts.target)
