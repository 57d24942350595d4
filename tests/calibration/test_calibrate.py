"""Calibration of the shipped model at a small budget, and of random ones where the numbers do not matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import OracleCache

from trimkv_edge.budget import cache_bytes
from trimkv_edge.calibration.calibrate import calibrate, calibrate_sample, occupancy_of
from trimkv_edge.calibration.heatmap import draw_heat_map
from trimkv_edge.calibration.levels import LADDER, level_name
from trimkv_edge.calibration.recording import record
from trimkv_edge.calibration.replay import replay
from trimkv_edge.calibration.request import memory_to_calibrate, streams_at_once
from trimkv_edge.calibration.streams import StreamPlan, Streams, sample_streams
from trimkv_edge.caps import Calibration, load_calibration
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.models.loading import LoadedModel, load_model
from trimkv_edge.models.source import ModelSource, find_source

CONFIG = CacheConfig(32, 16, 16, "global")
PLAN = StreamPlan(640, 4, 2)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return find_source("tiny")


@pytest.fixture(scope="module")
def loaded(source: ModelSource) -> LoadedModel:
    return load_model(source, "rg10")


@pytest.fixture(scope="module")
def streams(source: ModelSource) -> Streams:
    return sample_streams(source, PLAN)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(loaded: LoadedModel, source: ModelSource, lines: list[str]) -> Calibration:
    return calibrate_sample(loaded, source, CONFIG, plan=PLAN, target=0.97, report=lines.append)


def survivors(loaded: LoadedModel, config: CacheConfig, ids: list[int]) -> list[set[tuple[int, int, int]]]:
    """(layer, head, position) of every entry of a naive cache, after each event of a full pool. Its log-betas come from
    the model over the cache under test: what is compared is who stays and how that is counted."""
    run = record(loaded.model, config, torch.tensor([ids]), 1)
    layers, tokens, heads = run.log_beta.shape[1:]
    shared = (config.policy, config.min_per_head, config.threshold, config.caps)
    oracle = OracleCache(layers, heads, config.budget, config.buffer, 0, 0, 1, *shared)
    events = []
    for seen in range(1, tokens + 1):
        for layer, head in np.ndindex(layers, heads):
            oracle.append(layer, head, seen - 1, float(run.log_beta[0, layer, seen - 1, head]))
        if oracle.end_step(seen) and seen >= config.slots:
            events.append({(*where, p) for where in oracle.heads for p in oracle.positions(*where)})
    return events


def test_the_result_is_what_naive_caches_measure(
    found: Calibration, loaded: LoadedModel, source: ModelSource, streams: Streams
) -> None:
    exact, capped = (
        [event for ids in streams.held_out for event in survivors(loaded, config, ids)]
        for config in (CONFIG, found.cache)
    )
    agreement = np.mean([len(a & b) / len(a) for a, b in zip(exact, capped, strict=True)])
    assert found.agreement == pytest.approx(agreement, abs=1e-12)
    assert 0.97 <= found.agreement < 1
    kept = [event for ids in streams.calibration for event in survivors(loaded, CONFIG, ids)]
    counts = np.array(
        [[[sum(e[:2] == (layer, h) for e in event) for h in range(2)] for layer in range(4)] for event in kept]
    )
    np.testing.assert_allclose(found.occupancy.mean, counts.mean(0), atol=0.0051)
    assert found.occupancy.max == counts.max(0).tolist()
    # The smallest number that at least 95 % of the events do not exceed.
    ordered = np.sort(counts, 0)
    assert found.occupancy.p95 == ordered[int(np.ceil(0.95 * (len(ordered) - 1)))].tolist()


def test_the_caps_are_the_smallest_that_hold(found: Calibration, source: ModelSource, lines: list[str]) -> None:
    caps = found.cache.caps
    assert caps is not None
    assert all(cap % 8 == 0 for heads in caps for cap in heads)
    size = cache_bytes(source.shape(), found.cache, "float32")
    points = {point.level: point for point in found.trade}
    chosen = [point for point in found.trade if point.bytes == size]
    assert len(chosen) == 1
    assert chosen[0].entries == sum(map(sum, caps)) >= CONFIG.budget * 8
    ladder = [points[level_name(level)] for level in LADDER if level_name(level) in points]
    assert len(ladder) >= 5
    runs = {line.split()[1]: float(line.split()[-2]) for line in lines if "run with the model" in line}
    assert runs[chosen[0].level] == pytest.approx(100 * found.agreement, abs=0.001)
    failed = [level for level, agreement in runs.items() if agreement < 97]
    cheaper = [point for point in ladder if point.bytes < size]
    assert cheaper
    assert all(point.agreement < 0.97 or point.level in failed for point in cheaper), "a cheaper rung would have done"
    assert ladder[-1].agreement == 1
    assert [point.bytes for point in found.trade] == sorted(point.bytes for point in found.trade)


def test_the_record(found: Calibration, loaded: LoadedModel, tmp_path: Path) -> None:
    assert (found.model, found.dtype, found.target) == ("tiny", "float32", 0.97)
    assert (found.tokens, found.held_out_tokens) == (4 * 640, 2 * 640)
    assert found.weights_sha256 == loaded.info.weights_sha256
    assert found.gates_sha256 == loaded.gates.sha256
    assert replace(found.cache, caps=None) == CONFIG
    found.save(tmp_path / "caps.json")
    assert load_calibration(tmp_path / "caps.json") == found


def test_the_heat_map(found: Calibration, tmp_path: Path) -> None:
    """A picture of the three panels whose brightest part is the head that holds most: layer 1, head 0."""
    import matplotlib.image

    path = tmp_path / "caps.png"
    draw_heat_map(found, path)
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.shape[0] > 200
    assert picture.shape[1] > 500
    yellow = (picture[..., 0] > 0.7) & (picture[..., 1] > 0.8) & (picture[..., 2] < 0.35)
    rows, columns = yellow.nonzero()
    assert len(rows) > 1000
    assert found.occupancy.mean[1][0] == max(max(row) for row in found.occupancy.mean)
    in_panels = columns < picture.shape[1] * 0.88  # the scale at the right has every colour
    assert rows[in_panels].max() < picture.shape[0] * 0.6
    assert [file.name for file in tmp_path.iterdir()] == ["caps.png"]


def test_streams_read_together_or_alone_and_replayed_are_the_same(loaded: LoadedModel, streams: Streams) -> None:
    ids = torch.tensor(streams.held_out + streams.calibration[:1])[:, :300]
    done: list[tuple[int, int]] = []
    together = record(loaded.model, CONFIG, ids, 8)
    alone = record(loaded.model, CONFIG, ids, 2, lambda now, total: done.append((now, total)))
    assert alone.lifetimes.seen == together.lifetimes.seen == list(range(16, 301, 16))
    assert torch.equal(alone.lifetimes.lasted, together.lifetimes.lasted)
    assert len(alone.kept) == len(together.kept) == 3 * 16
    again = replay(together.log_beta, CONFIG)
    assert torch.equal(again.lasted, together.lifetimes.lasted)
    assert done[-1] == (900, 900)
    assert done == sorted(done)


def test_the_layer_policy_and_a_threshold(loaded: LoadedModel, source: ModelSource) -> None:
    config = CacheConfig(32, 16, 16, "layer", min_per_head=12, threshold=0.001)
    found = calibrate_sample(loaded, source, config, plan=PLAN, target=0.95)
    assert found.cache.caps is not None
    assert min(map(min, found.cache.caps)) >= 16
    assert all(sum(heads) >= 64 for heads in found.cache.caps)
    assert found.agreement >= 0.95
    assert max(map(sum, found.occupancy.mean)) <= 64


def test_random_weights(source: ModelSource) -> None:
    shape = find_source("tiny", None, True)
    loaded = load_model(shape, "rg", seed=3)
    found = calibrate_sample(loaded, shape, CacheConfig(16, 8, 8, "global"), plan=StreamPlan(400, 2, 1), target=0.9)
    assert found.weights_sha256 == ""
    assert found.agreement >= 0.9


def test_a_target_that_cannot_be_reached(loaded: LoadedModel, source: ModelSource) -> None:
    """Caps made from one constant token do not fit the conversation they are checked on."""
    ids = sample_streams(source, StreamPlan(640, 1, 1)).calibration
    with pytest.raises(ConfigError, match=r"no caps keep 100.000 % .* the best keep \d\d\.\d\d\d %: calibrate on more"):
        calibrate(loaded, source.shape(), CONFIG, [[5] * 640], ids, target=1.0)


@pytest.mark.parametrize(
    ("config", "more", "match"),
    [
        (
            CacheConfig(32, 16, 16),
            {},
            "policy trimkv gives every head the same budget.* choose --policy global or layer",
        ),
        (replace(CONFIG, policy="nothing"), {}, "policy 'nothing' is not known"),
        (replace(CONFIG, caps=((64,) * 2,) * 4), {}, "have caps already"),
        (CONFIG, {"target": 0.0}, "target is 0, but must be above 0"),
        (CONFIG, {"target": 1.5}, "target is 1.5"),
        (CONFIG, {"target": float("nan")}, "target is nan"),
        (CONFIG, {"dtype": "int8"}, "dtype 'int8' is not known"),
        (CONFIG, {"streams": [[1] * 60, [1] * 61]}, r"streams of one length, but they have \[60, 61\]"),
        (CONFIG, {"streams": []}, "streams of one length, but they have none"),
        (CONFIG, {"held_out": [[1] * 40]}, "streams of 40 tokens never fill a budget of 32 and a buffer of 16"),
    ],
)
def test_what_is_refused_before_anything_is_read(
    loaded: LoadedModel, source: ModelSource, config: CacheConfig, more: dict[str, object], match: str
) -> None:
    given = {"streams": [[1] * 60], "held_out": [[1] * 60], **more}
    arguments = given.pop("streams"), given.pop("held_out")
    with pytest.raises(ConfigError, match=match):
        calibrate(loaded, source.shape(), config, *arguments, report=pytest.fail, **given)  # type: ignore[arg-type]


def test_streams_past_the_last_position(loaded: LoadedModel, source: ModelSource) -> None:
    short = replace(loaded, rope=replace(loaded.rope, position_limit=59))
    with pytest.raises(ConfigError, match="streams of 60 tokens pass the model's last position 59"):
        calibrate(short, source.shape(), CONFIG, [[1] * 60], [[1] * 60])


def test_memory(source: ModelSource) -> None:
    """8 streams of the tiny model; one of a large one, whose cache alone is over 1 GiB."""
    assert streams_at_once(source.shape(), CONFIG) == 8
    large = find_source("qwen3-4b", None, True).shape()
    config = CacheConfig(4096, 128, 128, "global")
    assert streams_at_once(large, config) == 1
    slots = 36 * 8 * (4096 + 128)
    assert memory_to_calibrate(large, config) > large.parameters * 4 + slots * 2 * 128 * 4


def test_occupancy_of_a_table() -> None:
    kept = np.array([[number, 7] for number in range(1, 21)])
    occupancy = occupancy_of(kept, 1)
    assert occupancy.mean == [[10.5], [7.0]]
    assert occupancy.p95 == [[20], [7]]  # 19 of 20 events are 95 % only from the 20th value on, by linear rank 19.05
    assert occupancy.max == [[20], [7]]
