"""Exported policies other than ``trimkv``: the same survivors, slots and tokens as eager; no gates needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from executorch_artefact import make_executorch
from factories import base_config, base_model, random_tokens
from onnx_artefact import make_artefact
from torch import nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.onnx_evict import evict_model
from trimkv_edge.export.onnx_lint import lint_standard
from trimkv_edge.export.pipeline import ExportRequest, plan_export, run_export
from trimkv_edge.export.verify import check, compare, compare_survivors, load_tolerance, stream_plan
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.policies import POLICIES
from trimkv_edge.retention import NoGate

CONFIGS = {
    "streaming": CacheConfig(20, 8, 6, "streaming", sinks=4),
    "keydiff": CacheConfig(20, 8, 6, "keydiff", sinks=1, recent=3),
    "random": CacheConfig(20, 8, 6, "random"),
}
EAGER_ONLY = [name for name, policy in POLICIES.items() if not policy.exports]
TOLERANCE = load_tolerance("float32")


def ungated() -> GatedModel:
    base = base_model("llama-gqa")
    fix_rope(base, "auto")
    return GatedModel(base, nn.ModuleList(NoGate(2) for _ in range(2))).eval().requires_grad_(False)


def onnx_engine(folder: Path, config: CacheConfig, ops: str) -> Engine:
    return make_artefact(folder / "a", ungated(), config, ops).onnx()


def executorch_engine(folder: Path, config: CacheConfig, ops: str) -> Engine:
    return make_executorch(folder / "a", ungated(), config, ops).engine()


@pytest.mark.parametrize(
    ("make", "ops", "policy"),
    [
        (onnx_engine, "gqa", "keydiff"),
        (onnx_engine, "gqa", "streaming"),
        (onnx_engine, "standard", "random"),
        (executorch_engine, "xnnpack", "keydiff"),
        (executorch_engine, "portable", "random"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_without_gates_keeps_the_same_entries(
    make: Callable[[Path, CacheConfig, str], Engine], ops: str, policy: str, tmp_path: Path
) -> None:
    config = CONFIGS[policy]
    exported, eager = make(tmp_path, config, ops), EagerEngine(ungated(), config)
    plan = stream_plan(config.budget, config.buffer, config.prefill_chunk)
    report = compare(eager, exported, random_tokens(sum(plan)), plan, TOLERANCE.score_rel)
    check(report, TOLERANCE, policy)
    assert (report.events, report.undecidable) == (5, 0)
    np.testing.assert_array_equal(eager.survivors(), exported.survivors())  # slot by slot
    window = np.arange(exported.seen - exported.live, exported.seen)
    assert not np.array_equal(np.sort(exported.survivors()[0, 0]), window)


@pytest.mark.parametrize("policy", CONFIGS)
def test_evict_graphs_are_plain_safe_in_place_and_have_no_more_inputs(policy: str) -> None:
    graph = evict_model(CONFIGS[policy], 2, 2, 16)
    assert lint_standard(graph) == []
    names = {"seen", "past.log_beta", "past.positions", *(f"past.{i}.{k}" for i in range(2) for k in ("key", "value"))}
    assert {value.name for value in graph.graph.input} == names
    assert ("KeyScores" in {function.name for function in graph.functions}) == (policy == "keydiff")
    node = next(node for node in graph.graph.node if node.op_type == "Evict")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["policy"] == policy.encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("qwen3-gqa").save_pretrained(folder)
    return folder


def request_for(model: Path, output: Path, policy: str, gates: str | None = None) -> ExportRequest:
    return ExportRequest(
        str(model),
        output,
        "16",
        buffer=8,
        prefill_chunk=8,
        policy=policy,
        gates=gates,
        targets=("onnx",),
        random_weights=True,
    )


@pytest.mark.parametrize("gates", [None, "none"])
def test_policies_without_gates_export_models_without_gates(model: Path, tmp_path: Path, gates: str | None) -> None:
    plan = plan_export(request_for(model, tmp_path / "out", "random", gates))
    with_gates = plan_export(request_for(model, tmp_path / "out", "trimkv"))
    assert plan.memory.weights < with_gates.memory.weights
    if gates:
        manifest = run_export(plan, lambda line: None)
        assert (manifest.gates.kind, manifest.cache.policy) == ("none", "random")
        assert manifest.targets["onnx"].parity["survivor_mismatches"] == 0


def test_trimkv_needs_gates(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trimkv ranks by retention gates.*--gates none"):
        plan_export(request_for(model, tmp_path / "out", "trimkv", "none"))


@pytest.mark.parametrize("policy", EAGER_ONLY)
def test_other_policies_are_refused(model: Path, tmp_path: Path, policy: str) -> None:
    exported = "trimkv, global, layer, streaming, keydiff, random"
    with pytest.raises(ConfigError, match=f"'{policy}'.*export one of {exported}"):
        plan_export(request_for(model, tmp_path / "out", policy))


def swapped(policy: str, key: np.ndarray) -> tuple[int, int]:
    """(mismatches, undecidable) when an engine keeps the worst of four entries in place of the third best."""
    state = CacheState(4, key[None, None], key[None, None], np.zeros((1, 1, 4), np.float32), np.arange(4)[None, None])
    entries = torch.from_numpy(key)
    score = POLICIES["keydiff"].key_score
    assert score is not None
    order = score(entries).argsort(descending=True).numpy()
    want, got = order[[0, 1, 2]], order[[0, 1, 3]]
    config = CacheConfig(3, 1, 1, policy)
    return compare_survivors(state, config, want[None, None], got[None, None], TOLERANCE.score_rel)


def test_cosines_within_rounding_are_undecidable_and_others_are_not() -> None:
    close = np.array([[1.0, 0.0], [1.0, 1e-6], [-1.0, 0.2], [0.2, -1.0]], np.float32)
    apart = np.array([[1.0, 0.0], [1.0, 1e-1], [-1.0, 0.2], [0.2, -1.0]], np.float32)
    assert swapped("keydiff", close) == (0, 1)
    assert swapped("keydiff", apart) == (1, 0)
    # Positions and hashes are whole numbers: nothing excuses a difference.
    assert swapped("streaming", close) == (1, 0)
    assert swapped("random", close) == (1, 0)
