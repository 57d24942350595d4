"""Gate files: what fits is loaded exactly, what does not is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimkv_edge.errors import ModelError
from trimkv_edge.models.gates import GateShape, load_gates, random_gates, save_gates

SHAPE = GateShape(num_layers=3, hidden_size=16, num_kv_heads=2, act="silu")


@pytest.fixture(params=["rg", "rg10"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "gates.safetensors"
    save_gates(random_gates(request.param, SHAPE, 8, seed=1), path, {"base_sha256": "ab" * 32})
    return request.param, path


def test_round_trip(saved: tuple[str, Path]) -> None:
    kind, path = saved
    gates, info = load_gates(path, SHAPE, "ab" * 32)
    assert (info.kind, info.intermediate_size) == (kind, 8)
    x = torch.randn(4, 16)
    for want, got in zip(random_gates(kind, SHAPE, 8, seed=1), gates, strict=True):
        torch.testing.assert_close(got(x), want(x), atol=0, rtol=0)


def test_published_key_names(saved: tuple[str, Path]) -> None:
    kind, path = saved
    names = {key.split("retention_gate.")[1] for key in load_file(path) if key.startswith("model.layers.2.self_attn.")}
    extra = {"linear2.bias", "linear3.weight"} if kind == "rg10" else set()
    assert names == {"linear1.weight", "linear1.bias", "linear2.weight", "bias"} | extra


def test_refuses_gates_of_another_base(saved: tuple[str, Path]) -> None:
    with pytest.raises(ModelError, match="trained for base weights abababababab"):
        load_gates(saved[1], SHAPE, "cd" * 32)


@pytest.mark.parametrize("change", ["layers", "width", "heads"])
def test_refuses_gates_of_another_shape(saved: tuple[str, Path], change: str) -> None:
    other = {
        "layers": GateShape(4, 16, 2, "silu"),
        "width": GateShape(3, 32, 2, "silu"),
        "heads": GateShape(3, 16, 4, "silu"),
    }[change]
    with pytest.raises(ModelError, match="has gates for 3 layers" if change == "layers" else "do not fit"):
        load_gates(saved[1], other)


def test_refuses_shared_copies_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    save_gates(random_gates("rg10", SHAPE, 8, seed=1), path, {})
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.retention_gate.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"bias must be shared .* 1 of 3 copies .*layer 1's copy differs"):
        load_gates(path, SHAPE)


def test_refuses_foreign_tensors_pickles_damage_and_absence(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    for name, message in (
        ("foreign.safetensors", "not a retention gate's tensor"),
        ("damaged.safetensors", "not a readable safetensors file"),
        ("weights.pth", "no gate file"),
        ("absent.safetensors", "no gate file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_gates(tmp_path / name, SHAPE)
