"""ONNX graphs whose heads share a budget: against the eager pool, and against naive lists over all heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import gated_model, random_tokens
from onnx_artefact import check_another, feed, make_manifest, same, spread_gates
from oracle import OracleCache

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.onnx_lint import lint, lint_standard
from trimkv_edge.export.onnx_pooled_evict import pooled_evict_model
from trimkv_edge.manifest import Manifest
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.pooled_engine import PooledEngine
from trimkv_edge.runtime.engines.onnx_pooled import OnnxPooledEngine

CAPS = ((48, 16), (40, 24))
CONFIG = CacheConfig(22, 8, 8, "global", caps=CAPS)
CASES = {
    "gqa": ("gqa", CONFIG),
    "standard": ("standard", CONFIG),
    "layer": ("gqa", replace(CONFIG, policy="layer")),
    "floor": ("gqa", replace(CONFIG, min_per_head=9, sinks=2, recent=1)),
    "threshold": ("standard", replace(CONFIG, threshold=0.2, min_per_head=3)),
    "every-step": ("gqa", CacheConfig(12, 1, 1, "global", caps=((20, 10), (16, 10)))),
}
SIZES = (8, 3, 1, 1, 5, 8, 1)


class Made:
    """An exported model beside the eager one it was made from."""

    def __init__(self, folder: Path, ops: str, config: CacheConfig) -> None:
        self.model: GatedModel = spread_gates(gated_model("qwen3-gqa", "rg10"))
        self.folder, self.config = folder, config
        self.target = export_onnx(self.model, config, folder, ops=ops)
        self.manifest: Manifest = make_manifest(self.model, config, self.target)

    def eager(self) -> PooledEngine:
        engine = eager_engine(self.model, self.config)
        assert isinstance(engine, PooledEngine)
        return engine

    def onnx(self, *, aliased: bool = True) -> OnnxPooledEngine:
        return OnnxPooledEngine(self.folder, self.manifest, self.target, threads=1, aliased=aliased)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("onnx-pooled")

    class Store(dict[str, Made]):
        def __missing__(self, case: str) -> Made:
            self[case] = Made(root / case, *CASES[case])
            return self[case]

    return Store()


@pytest.mark.parametrize("case", CASES)
def test_survivors_are_those_of_eager_and_of_the_lists(made: dict[str, Made], case: str) -> None:
    eager, exported, config = made[case].eager(), made[case].onnx(), made[case].config
    oracle = OracleCache(
        2, 2, config.budget, config.buffer, config.sinks, config.recent, 1,
        config.policy, config.min_per_head, config.threshold, config.caps,
    )  # fmt: skip
    tokens = random_tokens(130)
    start = dropped = 0
    while start < len(tokens):
        if eager.room == 0:
            before = exported.entries
            eager.evict()
            exported.evict()
            oracle.end_step(exported.seen)
            dropped += exported.entries < before
            assert np.array_equal(eager.survivors(), exported.survivors())
            check(exported, oracle)
        count = min(SIZES[start % len(SIZES)], config.prefill_chunk, eager.room, len(tokens) - start)
        want, got = (engine.prefill(tokens[start : start + count]) for engine in (eager, exported))
        assert np.abs(want - got).max() <= 1e-4
        assert want.argmax() == got.argmax()
        state = exported.state()
        assert state.lengths is not None
        for layer, head in np.ndindex(2, 2):
            last = int(state.lengths[layer, head])
            for back in range(count, 0, -1):
                log_beta = float(state.log_beta[layer, head, last - back])
                oracle.append(layer, head, start + count - back, log_beta)
        start += count
    assert dropped >= 5
    assert len(set(exported.kept.reshape(-1).tolist())) > 1, "all heads hold the same number: nothing is shared"
    for name in ("key", "value"):
        np.testing.assert_allclose(getattr(eager.state(), name), getattr(exported.state(), name), atol=2e-5)


def check(engine: PooledEngine, oracle: OracleCache) -> None:
    survivors = engine.survivors()
    for where in np.ndindex(survivors.shape[:2]):
        held = sorted(position for position in survivors[where].tolist() if position >= 0)
        assert held == oracle.positions(*where)


def test_caps_bind(made: dict[str, Made]) -> None:
    """Without them the same stream would fill a head beyond its cap."""
    free = eager_engine(made["gqa"].model, replace(CONFIG, caps=None))
    assert isinstance(free, PooledEngine)
    feed(free, random_tokens(130), (1,))
    assert (free.kept > np.array(CAPS)).any()


@pytest.mark.parametrize("case", ["gqa", "standard"])
def test_in_place_equals_copied_and_reset_replays(made: dict[str, Made], case: str) -> None:
    tokens = random_tokens(120)
    one, two = made[case].onnx(), made[case].onnx(aliased=False)
    first = feed(one, tokens, SIZES)
    assert same(first, feed(two, tokens, SIZES))
    assert np.array_equal(one.survivors(), two.survivors())
    one.reset()
    assert (one.seen, one.live, one.entries) == (0, 0, 0)
    assert same(first, feed(one, tokens, SIZES))


@pytest.mark.parametrize("early", [4, 20, 90])
def test_state_moves_between_engines(made: dict[str, Made], early: int) -> None:
    tokens = random_tokens(early + 60)
    straight, eager, exported = made["gqa"].eager(), made["gqa"].eager(), made["gqa"].onnx()
    want = feed(straight, tokens, (1,))[-1]
    feed(eager, tokens[:early], (5,))
    feed(exported, random_tokens(77, seed=1), (8,))  # leftovers of another stream must not matter
    exported.load_state(eager.state())
    feed(exported, tokens[early : early + 30], (3,))
    eager.reset()
    eager.load_state(exported.state())
    last = feed(eager, tokens[early + 30 :], (4,))[-1]
    assert np.array_equal(np.sort(eager.survivors()), np.sort(straight.survivors()))
    assert np.abs(last - want).max() <= 1e-4


def test_a_head_reads_its_own_slots_only(made: dict[str, Made]) -> None:
    """Each head has a tensor of cap + B slots, and nothing else of the cache's size is made in a step."""
    decoder = onnx.load(made["gqa"].folder / "decoder.onnx", load_external_data=False)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in decoder.graph.input}
    for (layer, head), kind in ((where, kind) for where in np.ndindex(2, 2) for kind in ("key", "value")):
        assert shapes[f"past.{layer}.{head}.{kind}"] == [1, 1, CAPS[layer][head] + 8, 32]
    ops = Counter(node.op_type for node in decoder.graph.node)
    assert ops["GroupQueryAttention"] == 4
    assert lint(decoder) == []
    assert lint_standard(onnx.load(made["standard"].folder / "decoder.onnx", load_external_data=False)) == []


def test_heads_of_a_layer_lie_back_to_back(made: dict[str, Made]) -> None:
    engine = made["gqa"].onnx()
    whole = engine._arrays["0.key"]
    assert whole.shape == (48 + 8 + 16 + 8, 32)
    engine._arrays["0.1.key"][:] = 7
    assert (whole[56:] == 7).all()
    assert not whole[:56].any()
    held = sum(array.nbytes for name, array in engine._arrays.items() if name.count(".") != 2)
    from trimkv_edge.budget import ModelShape, cache_bytes

    assert held == cache_bytes(ModelShape(2, 0, 0, 0, 2, 32, 0, 0), CONFIG, "float32")


def test_evict_graph_is_plain_and_in_place() -> None:
    assert lint_standard(pooled_evict_model(CONFIG, 2, 2, 32)) == []


def test_refusals(made: dict[str, Made], tmp_path: Path) -> None:
    model = made["gqa"].model
    with pytest.raises(ConfigError, match="graphs need a cap for each"):
        export_onnx(model, replace(CONFIG, caps=None), tmp_path)
    with pytest.raises(ConfigError, match="3 layers x 2 KV heads, but the model has 2 x 2"):
        export_onnx(model, replace(CONFIG, caps=(*CAPS, (22, 22))), tmp_path)
    with pytest.raises(ConfigError, match="single-step score only"):
        export_onnx(model, replace(CONFIG, lookahead=4), tmp_path)
    other = replace(made["gqa"].manifest, cache=replace(CONFIG, caps=((48, 24), (40, 24))))
    with pytest.raises(ArtefactError, match="files of two artefacts are mixed"):
        OnnxPooledEngine(made["gqa"].folder, other, made["gqa"].target)


def test_engines_of_one_model_do_not_share_their_streams(made: dict[str, Made]) -> None:
    check_another(made["gqa"].onnx)
