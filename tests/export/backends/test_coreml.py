"""``npu:coreml``: what the compiled model is. Nothing here can run it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from backend_artefact import compiled, need
from factories import VOCAB, gated_model
from onnx_artefact import Artefact, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.coreml_package import CoreMLModel, read_package
from trimkv_edge.export.host_evicted import HostEvicted

need("npu:coreml")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
COUNTS = {"decode": 1, "prefill": 8}
# Two layers of seven linears (q, k, v, o, gate, up, down), and the output layer; the gates' own two stay.
LINEARS, GATES = 2 * 7 + 1, 2 * 2


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    model = spread_gates(gated_model("llama-gqa"))
    return compiled("npu:coreml", model, CONFIG, tmp_path_factory.mktemp("half"), "fp16")


@pytest.fixture(scope="module")
def found(half: Artefact) -> CoreMLModel:
    return read_package((half.folder / "coreml.pte").read_bytes())


def test_files(half: Artefact) -> None:
    assert half.target.files == {
        "program": "coreml.pte",
        "report": "coreml_report.json",
        "embedding": "host_embedding.bin",
        "constants": "coreml_host.json",
    }
    assert {path.name for path in half.folder.iterdir()} == set(half.target.files.values())
    assert (half.target.engine, half.target.ops) == ("npu:coreml", "fp16")
    rows = np.fromfile(half.folder / "host_embedding.bin", "<f4").reshape(VOCAB, 64)
    np.testing.assert_array_equal(rows, half.model.base.model.embed_tokens.weight.numpy())


def test_each_graph_is_one_delegate_with_every_node(half: Artefact) -> None:
    graphs = json.loads((half.folder / "coreml_report.json").read_text())["graphs"]
    assert set(graphs) == set(COUNTS)
    for graph in graphs.values():
        assert (graph["partitions"], graph["left"]) == (1, {})
        assert graph["nodes"] > 100


@pytest.mark.parametrize("name", COUNTS)
def test_the_model_is_stateless_and_half_precision(found: CoreMLModel, name: str) -> None:
    count, function = COUNTS[name], found.functions[name]
    assert found.version == 9  # iOS 18
    slots = [1, 2, 32, 16]
    assert sorted(function.inputs.values()) == sorted(
        [[1, count, 64], [1, count, 16], [1, count, 16], [1, 1, count, 32 + count], *[slots] * 4]
    )
    rows = [1, 2, count, 16]
    assert sorted(function.outputs.values()) == sorted([[1, 1, VOCAB], *[rows] * 4, *[[1, count, 2]] * 2])
    assert function.types == ["FLOAT16", "FLOAT32"]
    assert function.states == []
    assert function.operators["linear"] == LINEARS + GATES
    assert function.operators["softmax"] == 2
    assert not {"gather", "scatter", "reduce_argmin", "select", "less", "log"} & set(function.operators)


def test_functions_share_their_weights(found: CoreMLModel, half: Artefact) -> None:
    # The embedding stays with the host.
    parameters = sum(p.numel() for p in half.model.parameters()) - half.model.base.model.embed_tokens.weight.numel()
    assert 2 * parameters <= found.weights <= 2.2 * parameters


def test_four_bits_for_each_output_channel(tmp_path: Path) -> None:
    model = spread_gates(gated_model("qwen3-gqa"))
    made = compiled("npu:coreml", model, replace(CONFIG, prefill_chunk=1), tmp_path, "c4w")
    found = read_package((made.folder / "coreml.pte").read_bytes())
    assert list(found.functions) == ["decode"]
    operators = found.functions["decode"].operators
    assert operators["constexpr_blockwise_shift_scale"] == LINEARS
    assert operators["linear"] == LINEARS + GATES
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    assert 0.5 * linears <= found.weights <= 0.8 * linears


def test_another_model_is_noticed(found: CoreMLModel, half: Artefact) -> None:
    module = HostEvicted(half.model)
    found.check(module, CONFIG, COUNTS)
    with pytest.raises(VerificationError, match="decode has inputs"):
        found.check(module, replace(CONFIG, budget=32), COUNTS)
    with pytest.raises(VerificationError, match="functions decode, prefill, not decode: report"):
        found.check(module, CONFIG, {"decode": 1})
    with pytest.raises(VerificationError, match="specification version 8"):
        replace(found, version=8).check(module, CONFIG, COUNTS)
    function = found.functions["decode"]
    for changed, told in (
        (replace(function, operators={"gather": 1}), "operators gather"),
        (replace(function, states=["k"]), "states k"),
        (replace(function, types=["INT32"]), "INT32 at its border"),
        (replace(function, outputs={}), "0 outputs"),
    ):
        with pytest.raises(VerificationError, match=told):
            replace(found, functions={**found.functions, "decode": changed}).check(module, CONFIG, COUNTS)
