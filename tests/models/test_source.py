"""Names, folders and hub ids; everything that is missing is said in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import base_config, base_model

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.registry import MODELS
from trimkv_edge.models.source import find_source

# Parameters of the published checkpoints, as their safetensors files count them.
PUBLISHED = {
    "phi-3-mini": 3_821_079_552,
    "phi-3-mini-4k": 3_821_079_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "r1-distill-llama-8b": 8_030_261_248,
}

# What the size does not show, from the hub's config.json and generation_config.json:
# rms_norm_eps, theta, rope type, positions, sliding window, tied, bos, eos, eos of generation.
_LLAMA = (1e-5, 500_000.0, "llama3", 131_072, None, True, 128_000, [128_001, 128_008, 128_009])
DETAILS = {
    "phi-3-mini": (1e-5, 10_000.0, "longrope", 131_072, 262_144, False, 1, 32_000, [32_000, 32_001, 32_007]),
    "phi-3-mini-4k": (1e-5, 10_000.0, "default", 4_096, 2_047, False, 1, 32_000, [32_000, 32_001, 32_007]),
    "qwen3-4b": (1e-6, 1e6, "default", 40_960, None, True, 151_643, 151_645, [151_645, 151_643]),
    "qwen3-8b": (1e-6, 1e6, "default", 40_960, None, False, 151_643, 151_645, [151_645, 151_643]),
    "llama-3.2-1b": (*_LLAMA, [128_001, 128_008, 128_009]),
    "llama-3.2-3b": (*_LLAMA, [128_001, 128_008, 128_009]),
    "r1-distill-llama-8b": (1e-5, 500_000.0, "llama3", 131_072, None, False, 128_000, 128_001, []),
}


SHAPELESS = ("qwen3-vl-4b", "qwen3-vl-8b")  # their config.json is not known to the letter


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_every_named_model_is_listed() -> None:
    assert set(PUBLISHED) | {"tiny", "tiny-vl", *SHAPELESS} == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_shapes_have_the_published_size(name: str) -> None:
    source = find_source(name, random_weights=True)
    assert source.shape().parameters == PUBLISHED[name]
    assert source.stored_dtype == torch.bfloat16
    assert source.config.initializer_range == 0.02


@pytest.mark.parametrize("name", DETAILS)
def test_named_shapes_are_the_hubs(name: str) -> None:
    config = find_source(name, random_weights=True).config
    rope = config.rope_parameters
    found = (
        config.rms_norm_eps,
        rope["rope_theta"],
        rope["rope_type"],
        config.max_position_embeddings,
        getattr(config, "sliding_window", None),
        config.tie_word_embeddings,
        config.bos_token_id,
        config.eos_token_id,
        MODELS[name].stops,
    )
    assert found == DETAILS[name]
    if rope["rope_type"] == "longrope":
        assert rope["original_max_position_embeddings"] == 4096
    if rope["rope_type"] == "llama3":
        scaling = [rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")]
        assert scaling == [1.0, 4.0, 8192]
        assert rope["factor"] == (8.0 if name == "r1-distill-llama-8b" else 32.0)


@pytest.mark.usefixtures("offline")
def test_offline_message_names_the_ways_out() -> None:
    with pytest.raises(ModelError) as caught:
        find_source("phi-3-mini")
    message = str(caught.value)
    for part in ("microsoft/Phi-3-mini-128k-instruct", "--weights DIR", "--random-weights", "*.safetensors"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "a/b/c"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ModelError, match="known names: tiny, tiny-vl, phi-3-mini"):
        find_source(name)


def test_folder_round_trip_is_exact(tmp_path: Path) -> None:
    base = base_model("qwen3-gqa")
    base.save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    gates = tmp_path / "g.safetensors"
    from trimkv_edge.models.gates import GateShape, random_gates, save_gates

    save_gates(random_gates("rg", GateShape.of(base.config), 8, 0), gates, {"base_sha256": source.weights_sha256()})
    loaded = load_model(source, str(gates))
    assert (loaded.info.family, loaded.info.random_weights, loaded.gates.kind) == ("qwen3", False, "rg")
    state = loaded.model.base.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_folder_without_gates_asks_for_them(tmp_path: Path) -> None:
    base_model("llama-gqa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no 'rg' gates .*give --gates HUB-ID"):
        load_model(find_source(str(tmp_path)))


def test_published_gates_offline_say_what_to_do(tmp_path: Path) -> None:
    base_model("qwen3-gqa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ngocbh/TrimKV-Qwen3-4B-Math.* give its folder"):
        load_model(find_source("qwen3-4b", weights=tmp_path))


def test_random_weights_are_seeded_and_marked(tmp_path: Path) -> None:
    base_config("phi3-mha").save_pretrained(tmp_path)
    source = find_source(str(tmp_path), random_weights=True)
    first, again, other = (load_model(source, "rg10", seed=seed) for seed in (1, 1, 2))
    assert first.info.random_weights
    assert first.gates.source == "random (seed 1)"
    x = first.model.base.lm_head.weight
    assert torch.equal(x, again.model.base.lm_head.weight)
    assert not torch.equal(x, other.model.base.lm_head.weight)


def test_damaged_and_unsupported_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_source("tiny", weights=tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported families: llama, phi3, qwen3"):
        find_source(str(tmp_path))
    config.write_text("{")
    with pytest.raises(ModelError, match="cannot be used"):
        find_source(str(tmp_path))
    base_config("qwen3-gqa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        find_source(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(find_source(str(tmp_path)), str(tmp_path / "g.safetensors"))
    base_config("qwen3-gqa", use_sliding_window=True, sliding_window=8, max_window_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="sliding-window layers"):
        find_source(str(tmp_path))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    base_model("llama-gqa").save_pretrained(tmp_path)
    base_config("qwen3-gqa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack \d+ tensors|cannot be loaded"):
        load_model(find_source(str(tmp_path)), str(tmp_path / "g.safetensors"))


def test_rope_choice_is_checked(tmp_path: Path) -> None:
    base_config("phi3-longrope").save_pretrained(tmp_path / "long")
    base_config("llama-gqa").save_pretrained(tmp_path / "plain")
    long = find_source(str(tmp_path / "long"), random_weights=True)
    assert load_model(long).rope.variant == "long"
    for chosen in (dict(rope="short"), dict(stream_length=32)):
        short = load_model(long, **chosen).rope
        assert (short.variant, short.position_limit) == ("short", 32)
    assert load_model(long, stream_length=33).rope.variant == "long"
    plain = find_source(str(tmp_path / "plain"), random_weights=True)
    with pytest.raises(ConfigError, match="needs a LongRoPE model"):
        load_model(plain, rope="short")
    with pytest.raises(ConfigError, match="'medium' is not known"):
        load_model(long, rope="medium")
