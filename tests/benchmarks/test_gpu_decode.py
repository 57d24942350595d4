"""The benchmark of decoding one stream on a device: what it counts, where it places a stream, and that it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trimkv_edge.cli.common import run_cli
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.gpu.batch import Batch
from trimkv_edge.gpu.sampling import DeviceSampler
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.runtime.sampling import SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_decode
from gpu_decode import SMALL, Window, fill, live_bytes, model_config, place, placed, ratio, real, speed, spread, window

CONFIG = CacheConfig(16, 8, prefill_chunk=1)
DRAW = DeviceSampler(SamplingParams(temperature=1.0, seed=0))


def build(name: str = "phi-3-mini-4k", **other: int) -> GatedModel:
    return gpu_decode.random_model(model_config(name, **{**SMALL, **other}), "cpu")


@pytest.fixture(scope="module")
def model() -> GatedModel:
    return build()


def new_batch(model: GatedModel, size: int = 1) -> Batch:
    batch = Batch(model, CONFIG, size, compiled=False)
    fill(batch.graphs.cache)
    return batch


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_decode.py", *options])
    run_cli(gpu_decode.run)


def test_smoke_runs_and_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--smoke", "--output", str(tmp_path / "result.json"))
    names = ("bytes_per_step", "real", "memory", "placed", "speed_at_last_of_first")
    last = "smoke run on the CPU, not compiled: no measurement, nothing stored"
    assert capsys.readouterr().out.splitlines() == [*(f"{name} ran" for name in names), last]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--windows", "--pairs"])
def test_no_windows_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--smoke", option, "0")
    assert ended.value.code == 2
    assert f"{option} 0" in capsys.readouterr().err


def test_bytes_of_weights(model: GatedModel) -> None:
    # Of a layer: q, k and v, the output, gate and up, down, two norms. Of the model: last norm and output layer.
    layer = 48 * 144 + 48 * 48 + 48 * 64 + 32 * 48 + 2 * 48
    gate = 48 * 48 + 48 + 48 * 2 + 2
    assert gpu_decode.weight_bytes(model) == (2 * (2 * layer + 48 + 64 * 48), 4 * 2 * gate)
    # An output layer that is the embedding is read, an embedding of its own is not; norms of queries and keys.
    tied = build("qwen3-4b", head_dim=24)
    layer += 2 * 24
    assert gpu_decode.weight_bytes(tied) == (2 * (2 * layer + 48 + 64 * 48), 4 * 2 * gate)


def test_bytes_of_live_entries(model: GatedModel) -> None:
    batch = new_batch(model)
    place(batch, 16)
    seen = []
    for _ in range(CONFIG.buffer):
        batch.decode(1, DRAW)
        seen.append(batch.streams[0].live)
    # 2 layers of 2 heads, a key and a value of 24 numbers of 2 bytes for each entry.
    assert live_bytes(batch.graphs.cache) == 2 * 2 * 2 * 24 * 2 * sum(seen) / len(seen) == 192 * 2 * 20.5


def test_weights_are_drawn_on_the_device(model: GatedModel) -> None:
    kinds = {name: part.dtype for name, part in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "retention_gate" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "retention_gate" not in name} == {torch.bfloat16}
    layer = model.base.model.layers[0]
    assert layer.input_layernorm.weight.eq(1).all()
    assert layer.mlp.down_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(layer.mlp.down_proj.weight, model.base.model.layers[1].mlp.down_proj.weight)
    again = build()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("position", [16, 24, 16 + 8 * 1000])
def test_a_placed_stream_is_one_that_another_engine_takes(model: GatedModel, position: int) -> None:
    batch = new_batch(model, 3)
    place(batch, position)
    batch.evict()
    assert batch.graphs.cache.seen.tolist() == [position, position + 2, position + 5]
    assert batch.graphs.cache.live.tolist() == [16, 18, 21]
    for stream in batch.streams:
        other = EagerEngine(model, CONFIG)
        other.load_state(stream.state())
        assert other.seen == stream.seen
    assert batch.graphs.cache.log_beta.max() <= 0
    kept = batch.streams[0].survivors()
    assert kept.min() == 0
    assert kept.max() == (15 * position) // 16


def test_events_of_a_placed_batch_fall_in_turns(model: GatedModel) -> None:
    batch = new_batch(model, 4)
    place(batch, 24)
    live = []
    for _ in range(4):
        batch.decode(2, DRAW)
        live.append([stream.live for stream in batch.streams])
    assert live == [[18, 20, 22, 24], [20, 22, 24, 18], [22, 24, 18, 20], [24, 18, 20, 22]]


@pytest.mark.parametrize("position", [0, 8, 17, 23])
def test_positions_without_an_event_are_refused(model: GatedModel, position: int) -> None:
    with pytest.raises(ConfigError, match=f"position {position} "):
        place(new_batch(model), position)


def test_a_window_is_a_buffer_of_tokens_and_an_event(model: GatedModel) -> None:
    batch = new_batch(model)
    place(batch, 80)
    before = batch.streams[0].survivors()
    found = window(batch, DRAW)
    after = batch.streams[0].survivors()
    assert (batch.streams[0].seen, batch.streams[0].live) == (88, 16)
    heads = [set(new) - set(old) for new, old in zip(after.reshape(-1, 16), before.reshape(-1, 16), strict=True)]
    assert 0 < found.moved == sum(len(new) for new in heads) / len(heads)
    assert found.tokens > 0
    assert found.event > 0


def test_a_model_without_numbers_is_refused() -> None:
    model = build()
    model.base.model.norm.weight.data.fill_(torch.nan)
    batch = new_batch(model)
    place(batch, 16)
    with pytest.raises(VerificationError, match="not finite"):
        window(batch, DeviceSampler(SamplingParams()))


def test_the_real_run_reads_every_token(model: GatedModel) -> None:
    batch = new_batch(model)
    windows, notes = real(batch, DRAW, 3)
    assert (len(windows), len(notes)) == (3, 4)
    assert batch.streams[0].seen == 16 + (2 + 3) * 8
    # Every kept entry is of this stream.
    assert np.all(np.diff(np.sort(batch.streams[0].survivors(), -1), axis=-1) > 0)


def test_positions_are_compared_in_turns(model: GatedModel) -> None:
    batch = new_batch(model)
    assert len(placed(batch, DRAW, (16, 96), 2)) == 2
    assert batch.streams[0].seen == 96 + 8


def test_speed_of_windows() -> None:
    windows = [Window(0.08, 0.001, 3.0), Window(0.16, 0.0016, 5.0), Window(0.10, 0.02, 4.5)]
    # 10 ms a token is the median, so 8 MB a token are 0.8 GB/s, which is 40 % of 2.
    assert speed(windows, 10, 8e6, 2.0) == {
        "windows": 3,
        "ms_per_token": 10.0,
        "gb_per_s": 0.8,
        "of_copy": 0.4,
        "us_per_event": 1600.0,
        # 1 of 81, 1.6 of 161.6 and 20 of 120.
        "event_share": 0.01235,
        "moved_per_head": 4.5,
    }


def test_ratio_of_positions() -> None:
    pairs = [(Window(first, 9.0, 0.0), Window(second, 1.0, 0.0)) for first, second in ((2, 4), (3, 4), (9, 10))]
    assert ratio(pairs) == 0.75


def test_spread_of_memory() -> None:
    assert spread([(100, 200), (100, 200)]) == {
        "allocated_bytes": 100,
        "reserved_bytes": 200,
        "allocated_changed_by": 0,
        "reserved_changed_by": 0,
    }
    found = spread([(100, 200), (103, 200), (99, 264)])
    assert (found["allocated_changed_by"], found["reserved_changed_by"]) == (3, 64)
