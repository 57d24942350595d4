"""The benchmark of many streams on a device: both sides compute the same model, what it counts, and that it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from trimkv_edge.cli.common import run_cli
from trimkv_edge.config import CacheConfig
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.sampling import SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_batch
from gpu_batch import CACHES, CASES, Case, FullCache, cache_gib, compare, ours, plain_model, rate, theirs, until_it_fits
from gpu_decode import SMALL, model_config, random_model

CONFIG = CacheConfig(16, 8, prefill_chunk=1)
SHAPE = {**SMALL, "head_dim": 24, "num_key_value_heads": 1}


def config() -> Any:
    return model_config("qwen3-4b", **SHAPE)


@pytest.fixture(scope="module")
def model() -> GatedModel:
    return random_model(config(), "cpu")


@pytest.fixture(scope="module")
def wide() -> Any:
    """transformers' model in float32, and with logits that differ clearly."""
    base = plain_model(config(), random_model(config(), "cpu")).float()
    base.model.norm.weight.data.fill_(3.0)
    return base


def draw() -> DeviceSampler:
    return DeviceSampler(SamplingParams(temperature=1.0, seed=3))


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_batch.py", *options])
    run_cli(gpu_batch.run)


def test_smoke_runs_and_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--smoke", "--output", str(tmp_path / "result.json"))
    assert capsys.readouterr().out.splitlines() == [
        "trimkv 16 ran",
        "transformers dynamic ran",
        "transformers static ran",
        "smoke run on the CPU, not compiled: no measurement, nothing stored",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--windows", "--steps"])
def test_no_windows_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--smoke", option, "0")
    assert ended.value.code == 2
    assert f"{option} 0" in capsys.readouterr().err


def test_both_sides_are_one_model_in_one_memory(model: GatedModel) -> None:
    base = plain_model(config(), model)
    assert base.model.layers[1].mlp.up_proj.weight is model.base.model.layers[1].mlp.up_proj.weight
    assert base.get_output_embeddings().weight is model.base.get_input_embeddings().weight
    assert not any("retention_gate" in name for name, _ in base.named_parameters())
    assert base.config._attn_implementation == "sdpa"
    tokens = [5, 9, 60, 31, 2, 9, 44]
    batch = Batch(model, CONFIG, 2, compiled=False)
    batch.read({0: tokens, 1: tokens[:3]})
    with torch.no_grad():
        for row, own in enumerate((tokens, tokens[:3])):
            want = base(torch.tensor([own])).logits[0, -1].float()
            assert want.std() > 0.05
            torch.testing.assert_close(batch.graphs.logits[row], want, atol=0.01, rtol=0.0)


@pytest.mark.parametrize("kind", CACHES)
def test_full_cache_goes_on_from_its_context(wide: Any, kind: str) -> None:
    full = FullCache(wide, kind, Case(2, 40), 6, compiled=False)
    kept = [tuple(table[:, :, :40].clone() for table in (layer.keys, layer.values)) for layer in full.cache.layers]
    assert all(table.std() > 0.9 for tables in kept for table in tables)
    tokens = torch.cat([full.decode(4, draw()), full.decode(2, draw())], 1)
    assert tokens.shape == (2, 6)
    assert len(tokens.unique()) > 4
    # All at once, in a cache of its own, at positions that transformers finds itself.
    cache = DynamicCache(config=wide.config)
    for layer, tables in enumerate(kept):
        cache.update(*tables, layer)
    read = torch.cat([torch.zeros(2, 1, dtype=torch.int64), tokens[:, :-1]], 1)
    with torch.no_grad():
        wide(read, past_key_values=cache, use_cache=True)
    for got, want in zip(full.cache.layers, cache.layers, strict=True):
        assert int(got.get_seq_length()) == 46
        torch.testing.assert_close(got.keys, want.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.values, want.values, atol=1e-4, rtol=1e-4)


def test_a_stream_of_ours_counts_all_streams(model: GatedModel) -> None:
    row = ours(model, CONFIG, Case(3, 64), 2, compiled=False)
    assert (row["cache"], row["batch"], row["windows"]) == ("trimkv 16", 3, 2)
    assert row["tokens_per_s"] == pytest.approx(3e3 / row["ms_per_step"], rel=0.01)


def test_rows_of_a_case(model: GatedModel) -> None:
    told: list[dict[str, Any]] = []
    rows = compare(model, plain_model(config(), model), CONFIG, Case(2, 32), 2, 1, told.append, compiled=False)
    assert [row["cache"] for row in rows] == ["trimkv 16", "transformers dynamic", "transformers static"]
    assert rows == [{"context": 32} | row for row in told]


def test_rate_of_windows() -> None:
    # The median window of 8 tokens of 4 streams takes half a second.
    assert rate([0.25, 0.5, 4.0], 4, 8) == {"batch": 4, "windows": 3, "tokens_per_s": 64.0, "ms_per_step": 62.5}


def test_bytes_of_a_full_cache() -> None:
    qwen = model_config("qwen3-4b")
    # 36 layers of 8 heads, a key and a value of 128 numbers of 2 bytes: 144 KiB a token.
    assert [cache_gib(qwen, case.batch, case.context) for case in CASES.values()] == [18.0, 144.0]


def test_what_does_not_fit_is_a_row_and_half_is_tried() -> None:
    def attempt(batch: int) -> dict[str, Any]:
        if batch > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": batch, "tokens_per_s": 1.0}

    rows = until_it_fits(64, attempt)
    assert rows == [
        {"batch": 64, "out_of_memory": True},
        {"batch": 32, "out_of_memory": True},
        {"batch": 16, "tokens_per_s": 1.0},
    ]
    assert until_it_fits(4, attempt) == [{"batch": 4, "tokens_per_s": 1.0}]


def test_when_nothing_fits_every_try_is_a_row() -> None:
    def attempt(batch: int) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert [row["batch"] for row in until_it_fits(6, attempt)] == [6, 3, 1]


def test_other_errors_are_not_taken_for_memory(model: GatedModel) -> None:
    base = plain_model(config(), model)
    base.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(RuntimeError, match="size"):
        theirs(base, "dynamic", Case(1, 8), 1, 1, compiled=False)


def test_cases_are_those_that_were_asked_for() -> None:
    assert {name: (case.batch, case.context) for name, case in CASES.items()} == {
        "long": (4, 32768),
        "wide": (64, 16384),
    }
    assert list(CASES["long"].published.values()) == [130.5, 68.4]
    assert np.all([(case.context - 1024) % 128 == 0 for case in CASES.values()])
