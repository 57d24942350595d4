"""Gates of ExecuTorch programs: a method of their own, whose weights are in the file once and not in ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch_artefact import ExecuTorchArtefact, make_executorch
from executorch_pooled_artefact import pooled_artefact
from factories import base_model, gated_model, gated_vision_model, random_tokens
from onnx_artefact import feed, make_manifest, spread_gates
from torch import nn
from torch.export import ExportedProgram

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.executorch import PROGRAM, build_program
from trimkv_edge.export.executorch_check import operators
from trimkv_edge.export.executorch_quantize import reference_model, round_weight
from trimkv_edge.export.gates_apart import gates_apart, has_gates
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.manifest import Target
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.retention import NoGate
from trimkv_edge.runtime.engines.executorch import ExecuTorchEngine

CONFIG = CacheConfig(budget=12, buffer=6, prefill_chunk=4)
OPS = pytest.mark.parametrize("ops", ["xnnpack", "portable"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExecuTorchArtefact]:
    root, model = tmp_path_factory.mktemp("gates"), spread_gates(gated_model("qwen3-gqa", "rg10"))
    return {ops: make_executorch(root / ops, model, CONFIG, ops) for ops in ("xnnpack", "portable")}


def weight_names(program: ExportedProgram) -> Iterator[str]:
    """Of a method, those in its delegates too."""
    yield from program.state_dict
    for node in program.graph.nodes:
        if node.op == "get_attr":
            yield from getattr(program.graph_module, node.target).original_module.state_dict


@OPS
def test_forward_multiplies_with_no_gate(made: dict[str, ExecuTorchArtefact], ops: str) -> None:
    program = made[ops].program
    names = {method: set(weight_names(program.exported_program(method))) for method in ("forward", "gates")}
    assert not [name for name in names["forward"] if "retention_gate" in name]
    others = ("cache.", "_lifted_tensor_constant")
    assert not [name for name in names["gates"] if "retention_gate" not in name and not name.startswith(others)]
    # 7 matrices of each of 2 layers and the vocabulary's; 3 of each gate, of which all share the last.
    assert [sum("norm" not in name and name.endswith("weight") for name in names[m]) for m in names] == [16, 5]
    if ops == "portable":
        counts = operators(program)
        products = [sum(counts[m][f"aten::{name}.out"] for name in ("mm", "addmm")) for m in ("forward", "gates")]
        assert products == [15, 6]


@OPS
def test_weights_of_gates_are_in_the_file_once(made: dict[str, ExecuTorchArtefact], ops: str) -> None:
    data = (made[ops].folder / PROGRAM).read_bytes()
    for gate in made[ops].model.gates:
        assert data.count(gate.linear1.weight.numpy().tobytes()) == 1


@OPS
def test_what_the_methods_take_and_give(made: dict[str, ExecuTorchArtefact], ops: str) -> None:
    program = made[ops].engine()._program
    forward, gates = program.method_meta("forward"), program.method_meta("gates")
    outputs = [forward.output_tensor_meta(i).sizes() for i in range(forward.num_outputs())]
    assert outputs == [(1, 1, 320), (1, 4, 64), (1, 4, 64)]
    assert [gates.input_tensor_meta(i).sizes() for i in range(gates.num_inputs())] == [(1,), (1, 6, 64), (1, 6, 64)]
    assert gates.num_outputs() == 1
    constants = [program.load_method(f"get_trimkv_{name}").call(())[0] for name in ("gate_rows", "hidden_size")]
    assert constants == [6, 64]


@OPS
def test_forward_gives_what_gates_read(made: dict[str, ExecuTorchArtefact], ops: str) -> None:
    """Against what transformers' layers hand to the gates themselves."""
    read = list[torch.Tensor]()
    model = spread_gates(gated_model("qwen3-gqa", "rg10"))
    for gate in model.gates:
        gate.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    eager, engine = EagerEngine(model, CONFIG), made[ops].engine()
    for tokens in ([5], [7, 8, 9], [11]):
        read.clear()
        eager.prefill(tokens)
        engine.prefill(tokens)
        rows = engine._gate_rows
        got = rows.rows[:, rows.waiting - len(tokens) : rows.waiting]
        np.testing.assert_allclose(got, torch.cat(read).numpy(), atol=1e-5)


@OPS
def test_gates_write_nothing_but_their_tokens(made: dict[str, ExecuTorchArtefact], ops: str) -> None:
    engine, rng = made[ops].engine(), np.random.default_rng(0)
    before = rng.uniform(-9, -1, (2, 2, CONFIG.slots)).astype(np.float32)
    key = rng.standard_normal((2, 2, CONFIG.slots, 32)).astype(np.float32)
    engine._write(key, key, before, engine._kept_positions(), CONFIG.slots, CONFIG.slots)
    rows = torch.from_numpy(rng.standard_normal((2, 3, 64)).astype(np.float32))
    (slot,) = engine._run("gates", (torch.tensor([7]), rows[:1], rows[1:]))
    assert slot.tolist() == [7]
    after_key, after_value, after = engine._read()
    want = before.copy()
    with torch.no_grad():
        for layer, gate in enumerate(made[ops].model.gates):
            want[layer, :, 7:10] = gate(rows[layer]).numpy().T
    np.testing.assert_allclose(after, want, rtol=1e-5)
    for table in (after_key, after_value):
        np.testing.assert_array_equal(table, key)


def test_a_step_over_a_shared_budget_writes_no_log_betas() -> None:
    counts = operators(pooled_artefact("xnnpack").program)
    writes = {m: counts[m]["llama::update_cache_with_indices.out"] for m in ("forward", "gates")}
    assert writes == {"forward": 0, "gates": 1}
    assert not [name for name in counts["gates"] if name.startswith(("aten::copy", "aten::index_put"))]


@pytest.mark.parametrize("scheme", ["8da4w", "int8"])
def test_rounded_gates(tmp_path: Path, scheme: str) -> None:
    model = spread_gates(gated_model("llama-gqa", "rg10"))
    program = build_program(model, CONFIG, scheme=SCHEMES[scheme])
    with (tmp_path / PROGRAM).open("wb") as file:
        program.write_to_file(file)
    data = (tmp_path / PROGRAM).read_bytes()
    for gate in model.gates:
        assert data.count(round_weight(gate.linear1.weight, 8).codes.numpy().tobytes()) == 1
    target = Target("executorch", "xnnpack", {"program": PROGRAM})
    engine = ExecuTorchEngine(tmp_path, make_manifest(model, CONFIG, target), target, 1)
    rounded = EagerEngine(reference_model(model, model_weights(model), SCHEMES[scheme]), CONFIG)
    rows = torch.randn(2, 5, 64)
    engine._run("gates", (torch.tensor([0]), rows[:1], rows[1:]))
    with torch.no_grad():
        want = torch.stack([gate(row).T for gate, row in zip(rounded.model.gates, rows, strict=True)])
    np.testing.assert_allclose(engine._read()[2][:, :, :5], want, rtol=1e-4)


def ungated() -> GatedModel:
    base = base_model("llama-gqa")
    fix_rope(base, "auto")
    return GatedModel(base, nn.ModuleList(NoGate(2) for _ in range(2))).eval().requires_grad_(False)


@OPS
def test_a_model_without_gates_has_no_method_for_them(tmp_path: Path, ops: str) -> None:
    model, config = ungated(), replace(CONFIG, policy="keydiff", sinks=1)
    made = make_executorch(tmp_path / "a", model, config, ops)
    manifest = replace(made.manifest, gates=replace(made.manifest.gates, kind="none"))
    engine, eager = ExecuTorchEngine(made.folder, manifest, made.target, 1), EagerEngine(model, config)
    program = engine._program
    methods = {program.get_method_name(index) for index in range(program.num_methods())}
    assert not methods & {"gates", "get_trimkv_gate_rows"}
    assert program.method_meta("forward").num_outputs() == 1
    # Memory that a runtime hands out may hold anything.
    poison = [np.full_like(array, np.nan) for array in engine._read()]
    engine._write(*poison, engine._kept_positions(), 0, config.slots)
    engine.reset()
    for _ in range(2):
        for each in (eager, engine):
            feed(each, random_tokens(50), (3, 1))
        np.testing.assert_array_equal(eager.survivors(), engine.survivors())
        assert (engine.state().log_beta == 0).all()
        for each in (eager, engine):
            each.reset()


def check_apart(model: GatedModel, x: torch.Tensor) -> None:
    """Raises ``ZeroDivisionError`` at its end."""
    assert all(gate(x) is x for gate in model.gates)
    assert 1 // 0


@pytest.mark.parametrize("make", [gated_model, gated_vision_model], ids=["text", "pictures"])
def test_gates_come_back(make: Any) -> None:
    model = make("qwen3-gqa") if make is gated_model else make()
    gates = model.gates
    x = torch.ones(2)
    with pytest.raises(ZeroDivisionError), gates_apart(model):
        check_apart(model, x)
    assert all(one is other for one, other in zip(gates, model.gates, strict=True))
    assert has_gates(model)
    assert not has_gates(ungated())
