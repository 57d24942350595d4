"""``npu:coreml-stateful``: what the compiled model is, and what its graphs do before they are converted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_artefact import compiled, need
from factories import VOCAB, gated_model, random_tokens
from onnx_artefact import Artefact, spread_gates

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.coreml_package import CoreMLModel, read_folder
from trimkv_edge.export.backends.coreml_stateful import Stateful
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.onnx_gates import deferred_sigmoid
from trimkv_edge.host_cache import HostCache, Rotary, padded
from trimkv_edge.models.eager import EagerEngine

need("npu:coreml-stateful")
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)
COUNTS = {"decode": 1, "prefill": 8}
STATES = {f"past_{layer}_{kind}": [1, 2, 32, 16] for layer in (0, 1) for kind in ("key", "value")}
LINEARS, GATES = 2 * 7 + 1, 2 * 2


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    model = spread_gates(gated_model("llama-gqa"))
    return compiled("npu:coreml-stateful", model, CONFIG, tmp_path_factory.mktemp("half"), "fp16")


@pytest.fixture(scope="module")
def found(half: Artefact) -> CoreMLModel:
    return read_folder(half.folder / "coreml_stateful.mlpackage")


def test_files(half: Artefact) -> None:
    package = "coreml_stateful.mlpackage"
    assert half.target.files == {
        "program": f"{package}/Data/com.apple.CoreML/model.mlmodel",
        "weights": f"{package}/Data/com.apple.CoreML/weights/weight.bin",
        "package": f"{package}/Manifest.json",
        "report": "coreml_stateful_report.json",
        "embedding": "host_embedding.bin",
        "constants": "coreml_stateful_host.json",
    }
    files = [path for path in half.folder.rglob("*") if path.is_file()]
    assert {path.relative_to(half.folder).as_posix() for path in files} == set(half.target.files.values())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files if package in str(path))
    report = json.loads((half.folder / "coreml_stateful_report.json").read_text())
    assert report["model"]["functions"]["decode"]["states"] == STATES


@pytest.mark.parametrize("name", COUNTS)
def test_keys_and_values_are_states(found: CoreMLModel, name: str) -> None:
    count, function = COUNTS[name], found.functions[name]
    assert found.version == 9  # iOS 18
    assert function.states == STATES
    assert function.inputs == {
        "hidden": [1, count, 64],
        "cos": [1, count, 16],
        "sin": [1, count, 16],
        "mask": [1, 1, count, 32 + count],
        "where": [1] if count == 1 else [1, 1, 32, 8],
    }
    assert function.outputs == {"logits": [1, 1, VOCAB], "gate_0": [1, count, 2], "gate_1": [1, count, 2]}
    operators = function.operators
    assert (operators["read_state"], operators["write_state"]) == (4, 4)
    assert operators.get("slice_update", 0) == (4 if count == 1 else 0)
    assert operators["linear"] == LINEARS + GATES
    assert not {"gather", "scatter", "scatter_nd", "reduce_argmin", "select", "log"} & set(operators)


def test_functions_share_their_weights(found: CoreMLModel, half: Artefact) -> None:
    parameters = sum(p.numel() for p in half.model.parameters()) - half.model.base.model.embed_tokens.weight.numel()
    assert 2 * parameters <= found.weights <= 2.2 * parameters


# Phi-3 has one layer for queries, keys and values, and one for gate and up.
@pytest.mark.parametrize(("family", "linears"), [("qwen3-gqa", LINEARS), ("phi3-longrope", 2 * 4 + 1)])
def test_four_bits_and_a_chunk_of_one(family: str, linears: int, tmp_path: Path) -> None:
    made = compiled("npu:coreml-stateful", gated_model(family), CacheConfig(24, 8, 1), tmp_path, "c4w")
    model = read_folder(made.folder)
    assert list(model.functions) == ["decode"]
    assert model.functions["decode"].rounded == {"INT4": linears}
    assert set(model.functions["decode"].states) == set(STATES)


@pytest.mark.parametrize("family", ["llama-gqa", "phi3-longrope"])
def test_the_graphs_keep_what_the_eager_model_keeps(family: str) -> None:
    """In torch, with a host that moves rows by the positions before and after an event."""
    model = spread_gates(gated_model(family))
    module, eager, tokens = HostEvicted(model), EagerEngine(model, CONFIG), random_tokens(24 + 8 * 6 + 3)
    graphs = {count: Stateful(module, CONFIG, count) for count in COUNTS.values()}
    for name in graphs[1].names:  # one MLState for both functions
        graphs[8].register_buffer(name, graphs[1].get_buffer(name))
    rotary = model.base.model.rotary_emb
    turn = Rotary(rotary.inv_freq.float().numpy(), float(rotary.attention_scaling))
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    host = HostCache(CONFIG, *shape, model.head_dim)  # for betas and positions; its rows stay empty
    start, events = 0, 0
    for size in [8, 5, 8, 3, 1, 7, *[1] * 5, 3, 4, 4, 8, *[1] * 19]:
        count = 1 if size == 1 else 8
        which = padded(size, count)
        cos, sin = (torch.from_numpy(rows) for rows in turn.rows(start + which))
        ids = torch.tensor(tokens)[start + torch.from_numpy(which)]
        where = torch.tensor([host.live], dtype=torch.int32)
        if count > 1:
            where = torch.zeros(1, 1, CONFIG.slots, count)
            for token in range(size):
                where[0, 0, host.live + token, count - size + token] = 1
        with torch.no_grad(), deferred_sigmoid(model):
            hidden = model.base.model.embed_tokens(ids)[None]
            logits, *gates = graphs[count](hidden, cos, sin, torch.from_numpy(host.mask(size, count)), where)
        want = eager.prefill(tokens[start : start + size])
        np.testing.assert_allclose(logits[0, 0].numpy(), want, atol=1e-4)
        nothing = np.zeros((*shape, count, model.head_dim), np.float32)
        host.append(nothing, nothing, np.concatenate([gate.numpy() for gate in gates]), size)
        start += size
        if host.room == 0:
            before = host.positions.copy()
            host.evict()
            eager.evict()
            move(graphs[1], before, host.positions)
            events += 1
            kept = np.sort(eager.state().positions, axis=-1)
            np.testing.assert_array_equal(np.sort(host.positions[:, :, :24], axis=-1), kept)
    assert events == 6


def move(graph: Stateful, before: np.ndarray, after: np.ndarray) -> None:
    for layer, head, slot in np.ndindex(*after.shape[:2], CONFIG.budget):
        (came,) = np.flatnonzero(before[layer, head] == after[layer, head, slot])
        for kind in ("key", "value"):
            rows = graph.get_buffer(f"past_{layer}_{kind}")[0, head]
            rows[slot] = rows[came].clone()
