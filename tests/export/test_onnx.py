"""The exported graphs against the eager reference: who survives, where, and what the model says."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import gated_model, random_tokens
from onnx_artefact import Artefact, feed, make_artefact, same, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.export.onnx_evict import evict_model
from trimkv_edge.export.onnx_lint import lint

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
CASES = [
    ("qwen3-gqa", "rg10", "gqa"),
    ("qwen3-gqa", "rg10", "standard"),
    ("llama-gqa", "rg", "gqa"),
    ("llama-gqa", "rg", "standard"),
    ("phi3-mha", "rg", "gqa"),
    ("phi3-partial-rotary", "rg10", "standard"),
    ("phi3-partial-rotary", "rg10", "gqa"),
    ("phi3-longrope", "rg", "gqa"),
]
SIZES = (8, 3, 1, 1, 5, 8, 1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Artefact]:
    """Artefacts by case, each exported when a test first asks for it."""
    root = tmp_path_factory.mktemp("onnx")

    class Store(dict[tuple[str, str, str], Artefact]):
        def __missing__(self, case: tuple[str, str, str]) -> Artefact:
            family, gate, ops = case
            model = spread_gates(gated_model(family, gate))
            self[case] = make_artefact(root / "-".join(case), model, CONFIG, ops)
            return self[case]

    return Store()


@pytest.fixture(params=["gqa", "standard"])
def artefact(request: pytest.FixtureRequest, made: dict[tuple[str, str, str], Artefact]) -> Artefact:
    """One case of each operator set."""
    return made["qwen3-gqa", "rg10", request.param]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_same_survivors_tokens_and_logits(
    made: dict[tuple[str, str, str], Artefact], case: tuple[str, str, str]
) -> None:
    eager, exported = made[case].eager(), made[case].onnx()
    tokens = random_tokens(24 + 8 * 9 + 5)
    start, events = 0, 0
    while start < len(tokens):
        if eager.room == 0:
            eager.evict()
            exported.evict()
            events += 1
            np.testing.assert_array_equal(eager.survivors(), exported.survivors())
        count = min(SIZES[start % len(SIZES)], eager.room, len(tokens) - start)
        want, got = (engine.prefill(tokens[start : start + count]) for engine in (eager, exported))
        assert np.abs(want - got).max() <= 1e-4
        assert want.argmax() == got.argmax()
        start += count
    assert events >= 5
    kept = exported.survivors()
    assert len({tuple(sorted(row)) for row in kept.reshape(-1, kept.shape[-1])}) > 1, "the heads' choices do not differ"
    assert not np.array_equal(np.sort(kept[0, 0]), np.arange(exported.seen - exported.live, exported.seen))
    np.testing.assert_allclose(eager.state().log_beta, exported.state().log_beta, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(eager.state().key, exported.state().key, atol=1e-5)


def test_in_place_equals_copied(artefact: Artefact) -> None:
    tokens = random_tokens(120)
    one, two = artefact.onnx(), artefact.onnx(aliased=False)
    assert same(feed(one, tokens, SIZES), feed(two, tokens, SIZES))
    for a, b in zip(vars(one.state()).values(), vars(two.state()).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reset_replays(artefact: Artefact) -> None:
    engine = artefact.onnx()
    first = feed(engine, random_tokens(90), SIZES)
    kept = engine.survivors()
    engine.reset()
    assert (engine.seen, engine.live) == (0, 0)
    assert same(first, feed(engine, random_tokens(90), SIZES))
    np.testing.assert_array_equal(kept, engine.survivors())


def test_chunking_does_not_matter(artefact: Artefact) -> None:
    tokens = random_tokens(100)
    one, two = artefact.onnx(), artefact.onnx()
    last = feed(one, tokens, (8,))[-1], feed(two, tokens, (1,))[-1]
    np.testing.assert_array_equal(one.survivors(), two.survivors())
    assert np.abs(last[0] - last[1]).max() <= 1e-4


@pytest.mark.parametrize("early", [20, 90], ids=["before-the-first-event", "after-events"])
def test_state_moves_between_engines(artefact: Artefact, early: int) -> None:
    tokens = random_tokens(early + 60)
    straight, eager, exported = artefact.eager(), artefact.eager(), artefact.onnx()
    feed(straight, tokens, (1,))
    feed(eager, tokens[:early], (5,))
    feed(exported, random_tokens(77, seed=1), (8,))  # leftovers of another stream must not matter
    exported.load_state(eager.state())
    feed(exported, tokens[early : early + 30], (3,))
    eager.reset()
    eager.load_state(exported.state())
    feed(eager, tokens[early + 30 :], (4,))
    np.testing.assert_array_equal(straight.survivors(), eager.survivors())
    np.testing.assert_allclose(straight.state().value, eager.state().value, atol=1e-5)


def test_oldest_leave_first_on_ties(tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    for gate in model.gates:
        for parameter in gate.parameters():
            parameter.data.zero_()
        # log-beta is -8.8e-27 and, in float32, -0: all scores of head 1 are equal.
        gate.bias.data = torch.tensor([60.0, 120.0])
    artefact = make_artefact(tmp_path, model, CONFIG)
    engine = artefact.onnx()
    feed(engine, random_tokens(75), (8, 1))
    assert not engine.state().log_beta[:, 1].any()
    newest = np.arange(engine.seen - engine.live, engine.seen)
    np.testing.assert_array_equal(np.sort(engine.survivors(), axis=-1), np.broadcast_to(newest, (2, 2, newest.size)))


def test_buffer_of_one(tmp_path: Path) -> None:
    config = CacheConfig(budget=6, buffer=1, prefill_chunk=1)
    artefact = make_artefact(tmp_path, spread_gates(gated_model("llama-gqa")), config)
    eager, exported = artefact.eager(), artefact.onnx()
    tokens = random_tokens(40)
    want, got = feed(eager, tokens, (1,)), feed(exported, tokens, (1,))
    np.testing.assert_array_equal(eager.survivors(), exported.survivors())
    assert max(np.abs(a - b).max() for a, b in zip(want, got, strict=True)) <= 1e-4


def test_sinks_and_recent(artefact: Artefact, tmp_path: Path) -> None:
    config = CacheConfig(budget=24, buffer=8, prefill_chunk=8, sinks=2, recent=3)
    folder = shutil.copytree(artefact.folder, tmp_path / "protected")
    onnx.save(evict_model(config, 2, 2, artefact.model.head_dim), folder / "evict.onnx")
    protected = Artefact(folder, artefact.model, replace(artefact.manifest, cache=config), artefact.target)
    eager, exported = protected.eager(), protected.onnx()
    tokens = random_tokens(24 + 8 * 6)
    for engine in (eager, exported):
        feed(engine, tokens, (8,))
        engine.evict()
    np.testing.assert_array_equal(eager.survivors(), exported.survivors())
    must = {0, 1, *range(exported.seen - 3, exported.seen)}
    assert all(must <= set(row) for row in exported.survivors().reshape(4, -1).tolist())


def graph_of(artefact: Artefact, name: str) -> onnx.GraphProto:
    return onnx.load(artefact.folder / name, load_external_data=False).graph


def shapes(values) -> dict[str, list[int | str]]:  # type: ignore[no-untyped-def]
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_only_the_chunk_length_is_dynamic(artefact: Artefact) -> None:
    graph = graph_of(artefact, "decoder.onnx")
    found = {**shapes(graph.input), **shapes(graph.output)}
    assert found.pop("input_ids") == [1, "T"]
    assert found["past.1.value"] == [1, 2, 32, 32]
    assert found["logits"] == [1, 1, 320]
    if artefact.target.ops == "gqa":
        rows = {f"gate_input.{layer}": [1, "T", 64] for layer in (0, 1)}
        assert {name: found.pop(name) for name in rows} == rows
        gates = graph_of(artefact, "gates.onnx")
        assert shapes(gates.input) == {**rows, "live_length": [1], "past.log_beta": [32, 4]}
        assert shapes(gates.output) == {"present.log_beta": [32, 4]}
    else:
        assert found["past.log_beta"] == found["present.log_beta"] == [32, 4]
    assert all(isinstance(size, int) for shape in found.values() for size in shape)


def test_operators_of_each_variant(artefact: Artefact) -> None:
    graph = graph_of(artefact, "decoder.onnx")
    count = Counter((node.domain, node.op_type) for node in graph.node)
    scatters = {node.output[0] for node in graph.node if node.op_type == "ScatterND"}
    # Per layer q, k, v, o, gate, up, down; the output layer. The gates of rg10 have three each.
    products = 2 * 7 + 1
    if artefact.target.ops == "gqa":
        assert count["com.microsoft", "GroupQueryAttention"] == 2
        assert count["", "MatMul"] == products
        assert scatters == set()
        gates = graph_of(artefact, "gates.onnx")
        assert [node.op_type for node in gates.node].count("MatMul") == 2 * 3
        assert {node.output[0] for node in gates.node if node.op_type == "ScatterND"} == {"present.log_beta"}
    else:
        assert {domain for domain, _ in count} == {""}
        assert count["", "MatMul"] == products + 2 * 3 + 2 * 2  # and attention's own
        assert scatters == {"present.log_beta", *(f"present.{i}.{kind}" for i in (0, 1) for kind in ("key", "value"))}


def test_weights_lie_in_one_file_each(artefact: Artefact) -> None:
    """The same numbers as where the gates are in the decoder: none twice."""
    held = [
        sum(np.prod(tensor.dims) for tensor in graph_of(artefact, name).initializer if tensor.data_type == 1)
        for name in ("decoder.onnx", "gates.onnx")
        if (artefact.folder / name).exists()
    ]
    parameters = sum(parameter.numel() for parameter in artefact.model.parameters())
    table = artefact.model.base.get_input_embeddings().weight
    tied = table is artefact.model.base.get_output_embeddings().weight  # stored twice
    assert abs(sum(held) - parameters - tied * table.numel()) < 1000


def test_no_copy_of_the_cache(artefact: Artefact) -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(artefact.folder / "decoder.onnx", load_external_data=False))
    sizes = shapes([*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input])
    allowed = {"ScatterND", "GroupQueryAttention", "Transpose", "Reshape", "Unsqueeze"}  # views of keys for a product
    for node in inferred.graph.node:
        if any(sizes.get(name, [])[-3:] == [2, 32, 32] for name in node.output):
            assert node.op_type in allowed, f"{node.op_type} makes a tensor of the cache's size"


def test_nothing_local_is_left_in_the_files(artefact: Artefact) -> None:
    names = sorted(path.name for path in artefact.folder.iterdir())
    gates = ["gates.onnx", "gates.onnx.data"] if artefact.target.ops == "gqa" else []
    assert names == ["decoder.onnx", "decoder.onnx.data", "evict.onnx", *gates]
    for name in (name for name in names if name.endswith(".onnx")):
        assert b".py" not in (artefact.folder / name).read_bytes()


def test_export_rejects_what_it_cannot_do(tmp_path: Path) -> None:
    model = gated_model("llama-gqa")
    with pytest.raises(ConfigError, match=r"'fancy' are not known; use one of gqa, standard"):
        export_onnx(model, CONFIG, tmp_path, ops="fancy")
    with pytest.raises(ConfigError, match="lookahead is 4"):
        export_onnx(model, CacheConfig(budget=24, buffer=8, prefill_chunk=8, lookahead=4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_real_sizes_hold_no_tables() -> None:
    model = evict_model(CacheConfig(budget=2048), 3, 32, 96)
    assert not model.graph.initializer
    assert [(f.domain, f.name) for f in model.functions] == [("trimkv", "Evict"), ("trimkv", "MoveRows")]
    assert [node.domain for node in model.graph.node if node.domain] == ["trimkv"] * 7
    assert max(node.ByteSize() for function in model.functions for node in function.node) < 1024
    assert not lint(model)
