"""``docs/npu/vectors.json`` against the oracle, and against a host that shares nothing with the one that wrote it."""

from __future__ import annotations

import json
import runpy
from decimal import Decimal, getcontext
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import plain_host
import pytest
from oracle import OracleCache
from plain_host import PlainHost, f32

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "npu" / "vectors.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
STREAMS = {case["name"]: case for case in VECTORS["streams"]}


def test_the_file_is_what_the_script_writes() -> None:
    assert FILE.read_text(encoding="utf-8") == runpy.run_path(str(ROOT / "scripts" / "npu_vectors.py"))["text"]()
    assert FILE.stat().st_size < 200_000


def test_log_betas_are_right_to_the_last_bit() -> None:
    """In decimals of 60 digits, rounded once."""
    getcontext().prec = 60
    table = VECTORS["log_sigmoid"]
    for logit, log_beta in zip(table["logit"], table["log_beta"], strict=True):
        exact = -(1 + (-Decimal(logit)).exp()).ln()
        assert np.float32(float(exact)) == np.float32(log_beta)
        assert plain_host.log_sigmoid(logit) == log_beta
    assert sum(0 > value > -1e-7 for value in table["log_beta"]) >= 4, "where log(sigmoid(z)) in float32 is 0"


def test_scores() -> None:
    for case in VECTORS["scores"]:
        age = np.float32(case["seen"] + 1 - case["position"])
        assert float(np.float32(case["log_beta"]) * age) == case["score"]
        assert plain_host.retention(case["log_beta"], case["position"], case["seen"]) == case["score"]
    assert len({case["score"] for case in VECTORS["scores"]}) == 3 * 4 + 1, "ages of four sizes, and a log-beta of 0"


def test_rotary_rows() -> None:
    for case in VECTORS["rotary"]:
        for position, cos, sin in zip(case["positions"], case["cos"], case["sin"], strict=True):
            rows = plain_host.rotary(case["inverse_frequencies"], case["attention_scaling"], position)
            np.testing.assert_allclose(rows, [cos, sin], rtol=1.2e-7, atol=1e-9)
            # Anything but float32 angles is visibly different far out.
            if position == 2**24 - 1:
                exact = [np.cos(position * f) * case["attention_scaling"] for f in case["inverse_frequencies"]]
                assert np.abs(np.array(exact) - cos[: len(exact)]).max() > 1e-3


def test_masks_by_hand() -> None:
    """8 + 4 slots, so the chunk's columns begin at 12; the tokens are the last rows."""
    found = {(case["live"], case["count"], case["chunk"]): case["visible"] for case in VECTORS["masks"]}
    assert found[0, 1, 1] == [[12]]
    assert found[0, 3, 4] == [[], [13], [13, 14], [13, 14, 15]]
    assert found[5, 1, 1] == [[0, 1, 2, 3, 4, 12]]
    assert found[9, 2, 4] == [[], [], [*range(9), 14], [*range(9), 14, 15]]
    assert found[11, 1, 4] == [[], [], [], [*range(11), 15]]
    for case in VECTORS["masks"]:
        assert plain_host.visible(case["slots"], case["live"], case["count"], case["chunk"]) == case["visible"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_host_in_plain_python_keeps_the_same_entries_in_the_same_slots(name: str) -> None:
    case = STREAMS[name]
    host, events = PlainHost(case), iter(case["events"])
    for start, end in pairwise([0, *accumulate(case["chunks"])]):
        host.append(case["gate_logits"][start:end])
        if host.full():
            moved = host.evict()
            assert {"seen": host.seen, "moved": moved, "positions": host.positions()} == next(events)
    assert next(events, None) is None
    assert host.positions() == case["end"]
    assert host.seen == len(case["gate_logits"])
    assert len(case["events"]) >= 5


@pytest.mark.parametrize("name", [name for name, case in STREAMS.items() if case["policy"] == "trimkv"])
def test_survivors_are_the_oracles(name: str) -> None:
    case = STREAMS[name]
    layers, heads, budget = case["layers"], case["kv_heads"], case["budget"]
    oracle = OracleCache(layers, heads, budget, case["buffer"], case["sinks"], case["recent"])
    events = {event["seen"]: event for event in case["events"]}
    for position, token in enumerate(case["gate_logits"]):
        for layer, head in np.ndindex(layers, heads):
            log_beta = -float(np.logaddexp(0.0, -token[layer][head]))
            oracle.append(layer, head, position, f32(log_beta))
        assert oracle.end_step(position + 1) == (position + 1 in events)
        if event := events.get(position + 1):
            for layer, head in np.ndindex(layers, heads):
                kept = event["positions"][layer][head]
                assert sorted(kept) == oracle.positions(layer, head)
            assert event["moved"] <= case["buffer"] * layers * heads
    assert oracle.events == len(events)


def test_streaming_keeps_sinks_and_the_newest() -> None:
    for event in STREAMS["streaming"]["events"]:
        newest = list(range(event["seen"] - 4, event["seen"]))
        assert all(sorted(head) == [0, 1, *newest] for layer in event["positions"] for head in layer)


def test_the_streams_reach_what_they_are_for() -> None:
    ties = STREAMS["ties"]
    assert {z for token in ties["gate_logits"] for layer in token for z in layer} == {120.0}
    for event in ties["events"]:
        newest = list(range(event["seen"] - 6, event["seen"]))
        assert all(sorted(head) == newest for layer in event["positions"] for head in layer)
    logits = np.array(STREAMS["betas near one"]["gate_logits"])
    with np.errstate(divide="ignore"):
        naive = np.log(1 / (1 + np.exp(-logits.astype(np.float32)))).astype(np.float32)
    assert (naive == 0).mean() > 0.2
    heads = STREAMS["plain"]["events"][-1]["positions"]
    assert len({tuple(sorted(head)) for layer in heads for head in layer}) == 4
