"""Random weights as a folder: the hub's layout, one recipe for each tensor, written once or not at all."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import base_config
from safetensors import safe_open
from safetensors.torch import load_file
from text_tokenizers import byte_level
from transformers import AutoConfig, AutoModelForCausalLM

from trimkv_edge.errors import BudgetError, ConfigError, ModelError
from trimkv_edge.models import random_weights
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.random_weights import ensure_random_weights, plan_random_weights
from trimkv_edge.models.registry import MODELS, NamedModel
from trimkv_edge.models.source import ModelSource, find_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "random-weights"


def source_of(folder: Path, case: str = "phi3-mha", **more: Any) -> ModelSource:
    base_config(case, **more).save_pretrained(folder)
    return find_source(str(folder), random_weights=True)


def tensors_of(source: ModelSource) -> dict[str, torch.Tensor]:
    assert source.folder is not None
    found: dict[str, torch.Tensor] = {}
    for path in sorted(source.folder.glob("model*.safetensors")):
        found.update(load_file(path))
    return found


@pytest.mark.parametrize("case", ["phi3-mha", "qwen3-gqa", "llama-gqa"])
def test_transformers_finds_every_tensor_and_no_other(case: str, tmp_path: Path) -> None:
    made = ensure_random_weights(source_of(tmp_path / "m", case, attention_bias=case != "phi3-mha"), 0)
    model, report = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert parameter.eq(1).all()
        else:
            # 4 standard errors of a normal sample with the configuration's initializer_range of 0.02.
            count = parameter.numel()
            assert abs(parameter.mean().item()) < 4 * 0.02 / count**0.5
            assert abs(parameter.std().item() - 0.02) < 4 * 0.02 / (2 * count) ** 0.5


def test_large_models_are_sharded_as_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 90_000)
    source = source_of(tmp_path / "m", dtype="bfloat16")
    folder = ensure_random_weights(source, 0).folder
    assert folder is not None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    total = 0
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 90_000
        total += size
    assert index["metadata"]["total_size"] == total == 2 * source.shape().parameters
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_one_file_where_it_fits_and_no_copy_of_tied_weights(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen3-gqa", tie_word_embeddings=True)
    made = ensure_random_weights(source, 0)
    assert made.folder is not None
    assert {path.name for path in made.folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "random_weights.json",
    }
    tensors = tensors_of(made)
    assert "lm_head.weight" not in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == source.shape().parameters
    loaded = load_model(source)
    assert torch.equal(loaded.model.base.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_tensor_follows_from_seed_and_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors_of(ensure_random_weights(source_of(tmp_path / "m"), 3))
    name = "model.layers.1.mlp.down_proj.weight"
    # The recipe (format 1), written again: other numbers for the same seed need another RANDOM_FORMAT.
    seed = int(hashlib.sha256(f"3 {name}".encode()).hexdigest(), 16)
    numbers = np.random.Generator(np.random.PCG64(seed)).standard_normal(64 * 96, dtype=np.float32)
    np.testing.assert_array_equal(whole[name].numpy(), (numbers * np.float32(0.02)).reshape(64, 96))
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 1)
    monkeypatch.setattr(random_weights, "_BLOCK", 1000)
    deeper = tensors_of(ensure_random_weights(source_of(tmp_path / "deeper", num_hidden_layers=3), 3))
    assert set(whole) < set(deeper)
    assert all(torch.equal(tensor, deeper[key]) for key, tensor in whole.items())
    other = tensors_of(ensure_random_weights(source_of(tmp_path / "m"), 4))
    assert not any(torch.equal(tensor, other[key]) for key, tensor in whole.items() if tensor.ndim == 2)
    assert not torch.equal(whole[name], whole[name.replace("1", "0")])


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    exact = tensors_of(ensure_random_weights(source_of(tmp_path / "m"), 0))
    rounded = tensors_of(ensure_random_weights(source_of(tmp_path / "b", dtype="bfloat16"), 0))
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())


def test_a_finished_folder_is_reused_and_a_damaged_one_made_again(tmp_path: Path, cache: Path) -> None:
    source = source_of(tmp_path / "m")
    assert not cache.exists()  # planning and finding write nothing
    assert not plan_random_weights(source, 0).ready
    calls: list[tuple[int, int]] = []
    made = ensure_random_weights(source, 0, lambda *done: calls.append(done))
    total = 4 * source.shape().parameters
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert plan_random_weights(source, 0).ready
    assert made.random_weights
    assert made.folder is not None
    assert made.folder.parent == cache
    for again in (source, made):
        assert ensure_random_weights(again, 0, lambda *_: pytest.fail("written again")).folder == made.folder
    weights = made.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    ensure_random_weights(source, 0)
    assert weights.read_bytes() == content
    # Another recipe for the same numbers does not fit.
    marker = made.folder / "random_weights.json"
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 0'))
    assert not plan_random_weights(source, 0).ready
    folders = {ensure_random_weights(source, seed).folder for seed in (0, 1)}
    folders.add(ensure_random_weights(source_of(tmp_path / "b", dtype="bfloat16"), 0).folder)
    assert len(folders) == 3


def test_an_interrupted_write_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path: Path, cache: Path) -> None:
    source = source_of(tmp_path / "m")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_random_weights(source, 0, stop)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    folder = plan_random_weights(source, 0).folder
    killed = cache / f".{folder.name}.partial-abc"
    killed.mkdir()
    ensure_random_weights(source, 0)
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m")
    writers = [[], [], [], []]  # type: ignore[var-annotated]
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda calls: ensure_random_weights(source, 0, lambda *_: calls.append(1)), writers))
    assert len({made.folder for made in folders}) == 1
    assert sum(bool(calls) for calls in writers) == 1


def test_the_tokenizer_of_the_shape_comes_along(tmp_path: Path) -> None:
    folders = []
    for size in (300, 310):
        source = source_of(tmp_path / "m")
        byte_level(size).save(str(tmp_path / "m" / "tokenizer.json"))
        (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
        made = ensure_random_weights(source, 0).folder
        assert made is not None
        for name in ("tokenizer.json", "generation_config.json"):
            assert (made / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
        folders.append(made)
    assert folders[0] != folders[1]


def test_a_named_model_has_the_hubs_files(monkeypatch: pytest.MonkeyPatch) -> None:
    full = MODELS["phi-3-mini"]
    small = dict(num_hidden_layers=1, hidden_size=192, num_attention_heads=2, num_key_value_heads=2, vocab_size=320)
    small |= dict(intermediate_size=64, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    entry = NamedModel(full.repo, "phi3", {}, {**full.shape, **small}, [2, 7])
    monkeypatch.setitem(MODELS, "phi-3-small", entry)
    source = find_source("phi-3-small", random_weights=True)
    made = ensure_random_weights(source, 0).folder
    assert made is not None
    fields = json.loads((made / "config.json").read_text())
    assert fields == {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **entry.shape}
    ends = json.loads((made / "generation_config.json").read_text())
    assert ends == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}
    loaded, hollow = load_model(source), load_model(source, hollow=True)
    assert loaded.rope.variant == "long"
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, hollow.weights(name))
    # Fewer layers than the name says: the folder has what was asked for.
    changed = AutoConfig.from_pretrained(made)
    changed.intermediate_size = 32
    other = ensure_random_weights(replace(source, config=changed), 0).folder
    assert other != made
    assert AutoConfig.from_pretrained(other).intermediate_size == 32


def test_the_hash_follows_from_shape_seed_and_dtype(tmp_path: Path) -> None:
    one, moved = source_of(tmp_path / "m"), source_of(tmp_path / "n")
    deeper, rounded = source_of(tmp_path / "d", num_hidden_layers=3), source_of(tmp_path / "b", dtype="bfloat16")
    assert one.weights_sha256(1) == moved.weights_sha256(1) == ensure_random_weights(one, 1).weights_sha256(1)
    assert len({one.weights_sha256(1), one.weights_sha256(2), deeper.weights_sha256(1), rounded.weights_sha256(1)}) == 4


def test_what_cannot_be_written_says_what_to_do(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = source_of(tmp_path / "huge", vocab_size=10**13)
    with pytest.raises(BudgetError, match=r"GiB are free: free some, or set TRIMKV_CACHE"):
        ensure_random_weights(huge, 0)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    source = source_of(tmp_path / "m")
    with pytest.raises(ConfigError, match="seed is -1"):
        ensure_random_weights(source, -1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written to .*set TRIMKV_CACHE to a folder that can hold"):
        ensure_random_weights(source, 0)
    odd = source_of(tmp_path / "odd")
    odd.config.dtype = torch.int8
    with pytest.raises(ModelError, match="use bfloat16 or float32"):
        ensure_random_weights(odd, 0)


def test_the_cache_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert random_weights.cache_folder() == Path("/var/cache/me/trimkv-edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert random_weights.cache_folder() == Path("/home/me/.cache/trimkv-edge")


@pytest.mark.parametrize("hollow", [True, False])
def test_loading_leaves_the_source_as_it_was(tmp_path: Path, hollow: bool) -> None:
    source = source_of(tmp_path / "m", dtype="bfloat16")
    before = source.config.to_dict()
    source.shape()
    loaded = load_model(source, hollow=hollow)
    assert source.config.to_dict() == before
    assert loaded.info.weights_sha256 == source.weights_sha256(0)
