"""A hollow model has all shapes and no memory; filled again it is the model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import base_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trimkv_edge.errors import ModelError
from trimkv_edge.models import skeleton as skeleton_module
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, random_gates
from trimkv_edge.models.skeleton import WeightFiles, filled, fits, model_weights, skeleton, weights_of

KINDS = ("qwen3-gqa", "llama-gqa", "phi3-mha")


def saved(kind: str, folder: Path, shard: str = "5GB", **more: Any) -> Any:
    config = base_config(kind, **more)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(folder, max_shard_size=shard)
    return base


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_filled_again_it_is_the_same_model(kind: str, shard: str, tied: bool, tmp_path: Path) -> None:
    base = saved(kind, tmp_path, shard, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "50KB")
    files, hollow = WeightFiles(tmp_path), skeleton(base_config(kind, tie_word_embeddings=tied))
    assert fits(hollow, files)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hollow.parameters()}
    assert sum(held.values()) <= 4 * len(held)
    gates = random_gates("rg10", GateShape.of(base.config), 16, 0)
    real = filled(GatedModel(hollow, gates), weights_of(files, gates))
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(real.base.get_parameter(name), parameter, rtol=0, atol=0)
    assert (real.base.lm_head.weight is real.base.model.embed_tokens.weight) == tied
    torch.testing.assert_close(real.base.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq, rtol=0, atol=0)
    assert real.gates[0].linear3.weight is real.gates[1].linear3.weight
    torch.testing.assert_close(real.gates[1].linear1.weight, gates[1].linear1.weight, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 35, 2**24])
def test_a_tensor_is_read_in_pieces(block: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(skeleton_module, "_BLOCK", block)
    shapes = {"matrix": (9, 7), "vector": (11,), "number": (), "cube": (3, 2, 5), "none": (0, 4)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    for name, want in tensors.items():
        files(name).add_(1)  # the caller's own: neither the file nor what is read next changes
        assert files(name).dtype == torch.float32
        assert torch.equal(files(name), want.float())


def test_weights_of_a_model_in_memory_are_copies(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    model_weights(linear)("weight").add_(1)
    assert torch.equal(linear.weight, before)


def test_other_names_or_shapes_do_not_fit(tmp_path: Path) -> None:
    saved("qwen3-gqa", tmp_path)
    hollow = skeleton(base_config("qwen3-gqa"))
    tensors = load_file(tmp_path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert not fits(hollow, WeightFiles(tmp_path))
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, tmp_path / "model.safetensors")
    assert not fits(hollow, WeightFiles(tmp_path))
    save_file({**tensors, "model.norm.weight": norm}, tmp_path / "model.safetensors")
    assert fits(hollow, WeightFiles(tmp_path))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    saved("qwen3-gqa", tmp_path, "50KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    lost = next(iter(table["weight_map"].values()))
    (tmp_path / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"lack the file {lost}"):
        WeightFiles(tmp_path)
    (tmp_path / lost).write_bytes(b"\x10")
    files = WeightFiles(tmp_path)
    with pytest.raises(ModelError, match=rf"{lost} cannot be read"):
        files(next(name for name, file in table["weight_map"].items() if file == lost))
    index.write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        WeightFiles(tmp_path)
