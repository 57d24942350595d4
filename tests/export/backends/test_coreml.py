"""``npu:coreml``: what the compiled model is. Nothing here can run it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from backend_artefact import compiled, need
from factories import VOCAB, gated_model
from onnx_artefact import Artefact, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.coreml_package import CoreMLModel, Wanted, read_package
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
    assert function.states == {}
    assert function.operators["linear"] == LINEARS + GATES
    assert function.operators["softmax"] == 2
    assert function.rounded == {}
    assert not {"quantize", "gather", "scatter", "reduce_argmin", "select", "less", "log"} & set(function.operators)


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
    assert found.functions["decode"].rounded == {"INT4": LINEARS}


def test_eight_bits_for_weights_and_inputs_of_linear_layers(tmp_path: Path) -> None:
    model = spread_gates(gated_model("llama-gqa"))
    made = compiled("npu:coreml", model, CONFIG, tmp_path, "8a8w")
    graphs = json.loads((made.folder / "coreml_report.json").read_text())["graphs"]
    assert {name: (graph["partitions"], graph["left"]) for name, graph in graphs.items()} == dict.fromkeys(
        COUNTS, (1, {})
    )
    found = read_package((made.folder / "coreml.pte").read_bytes())
    assert set(found.functions) == set(COUNTS)
    for function in found.functions.values():
        # q, k and v read the same input, and so do gate and up: four of a layer, and the output layer's.
        assert function.operators["quantize"] == function.operators["dequantize"] == 2 * 4 + 1
        assert function.rounded == {"INT8": LINEARS}
        assert function.operators["linear"] == LINEARS + GATES
        assert function.types == ["FLOAT16", "FLOAT32"]
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    assert linears <= found.weights <= 1.4 * linears  # once for both functions


def test_another_model_is_noticed(found: CoreMLModel, half: Artefact) -> None:
    module = HostEvicted(half.model)
    wanted = Wanted.stateless(module, CONFIG, COUNTS, "fp16")
    found.check(wanted)
    for other, told in (
        (Wanted.stateless(module, replace(CONFIG, budget=32), COUNTS, "fp16"), "decode has inputs"),
        (Wanted.stateless(module, CONFIG, {"decode": 1}, "fp16"), "functions decode, prefill, not decode: report"),
        (Wanted.stateless(module, CONFIG, COUNTS, "c4w"), "decode has rounded weights {}, not {'INT4': 15}"),
        (wanted.stateful({"decode": [1], "prefill": [8]}, {"past_0_key": [1, 2, 32, 16]}), "decode has states {}"),
    ):
        with pytest.raises(VerificationError, match=re.escape(told)):
            found.check(other)
    with pytest.raises(VerificationError, match="specification version 8"):
        replace(found, version=8).check(wanted)
    function = found.functions["decode"]
    for changed, told in (
        (replace(function, operators={"gather": 1}), "operators gather"),
        (replace(function, operators={"quantize": 1}), "operators quantize"),
        (replace(function, operators={"write_state": 1}), "operators write_state"),
        (replace(function, states={"k": [1]}), "states {'k': [1]}"),
        (replace(function, types=["INT32"]), "INT32 at its border"),
        (replace(function, outputs={}), "0 outputs"),
        (replace(function, rounded={"INT8": 1}), "rounded weights {'INT8': 1}, not {}"),
    ):
        with pytest.raises(VerificationError, match=re.escape(told)):
            replace(found, functions={**found.functions, "decode": changed}).check(wanted)
