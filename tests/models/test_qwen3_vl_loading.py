"""Qwen3-VL from folders: weights, published gates with nested configuration, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import PATCH_VALUES, gated_vision_model, vision_base, vision_config
from published_gates import VISION, raw_gates, write_published
from transformers import AutoConfig
from vision_streams import Mixed, plain_logits

from trimkv_edge.cli.evaluate import main as evaluate
from trimkv_edge.cli.import_gates import main as import_command
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ModelError
from trimkv_edge.models.gate_source import import_gates
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.registry import MODELS
from trimkv_edge.models.skeleton import filled
from trimkv_edge.models.source import find_source
from trimkv_edge.models.vision_engine import vision_engine

ROOMY = CacheConfig(budget=64, buffer=32, prefill_chunk=32)
STREAM = Mixed(7).text(5).image(4, 6).text(4)
KEY = "base.model.language_model.layers.{}.self_attn.retention_gate.{}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vl")
    vision_base().save_pretrained(made)
    return made


def last_logits(model: GatedVisionModel) -> np.ndarray:
    engine = vision_engine(model, ROOMY)
    engine.show(STREAM.pictures(model))
    return engine.prefill(STREAM.tokens)


@pytest.mark.parametrize("hollow", [False, True])
def test_a_folder_is_read_exactly(folder: Path, hollow: bool) -> None:
    loaded = load_model(find_source(str(folder), vision=True), "none", hollow=hollow)
    model = filled(loaded.model, loaded.weights) if hollow else loaded.model
    assert isinstance(model, GatedVisionModel)
    assert np.abs(last_logits(model) - plain_logits(vision_base(), STREAM)[-1]).max() < 1e-4
    info = loaded.info
    assert (info.family, info.num_layers, info.hidden_size, info.num_kv_heads, info.head_dim) == (
        "qwen3-vl",
        3,
        64,
        2,
        16,
    )
    assert info.parameters == sum(p.numel() for p in vision_base().parameters())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = vision_config()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base = type(vision_base())(config)
    assert base.lm_head.weight is base.model.language_model.embed_tokens.weight
    base.save_pretrained(tmp_path)
    model = load_model(find_source(str(tmp_path), vision=True), "none").model
    assert model.base.lm_head.weight is model.base.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("imported", [False, True])
def test_published_gates_sit_in_the_text_decoder(kind: str, imported: bool, folder: Path, tmp_path: Path) -> None:
    sizes = (3, 64, 2, 8)
    raw = raw_gates(kind, *sizes, VISION)
    given = write_published(tmp_path / "in", raw, kind, *sizes, nest=True)
    # As a vision-language model's: sizes of the encoder beside the decoder's, some fields on the outside too.
    fields = json.loads((given / "config.json").read_text())
    fields |= {"hidden_size": 999, "vision_config": vision_config().vision_config.to_dict(), "model_type": "qwen3_vl"}
    (given / "config.json").write_text(json.dumps(fields))
    source = find_source(str(folder), vision=True)
    if imported:
        given = import_gates(str(given), tmp_path / "out", base_sha256=source.weights_sha256()).folder
    loaded = load_model(source, str(given))
    assert (loaded.gates.kind, loaded.gates.intermediate_size) == (kind, 8)
    state = loaded.model.state_dict()
    assert {name for name in state if "retention_gate" in name} == {f"base.{name}" for name in raw}
    for name, tensor in raw.items():
        assert torch.equal(state[f"base.{name}"], tensor.float())
    last_logits(loaded.model)


def test_the_command_imports_gates_for_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (3, 64, 2, 8)
    given = write_published(tmp_path / "in", raw_gates("rg10", *sizes, VISION), "rg10", *sizes, nest=True)
    import_command([str(given), "-o", str(tmp_path / "out"), "--model", str(folder)])
    assert "use it    from Python (docs/models.md)" in capsys.readouterr().out
    last_logits(load_model(find_source(str(folder), vision=True), str(tmp_path / "out")).model)


def test_random_weights_of_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path / "cache"))
    source = find_source(str(folder), random_weights=True, vision=True)
    first, again, other = (load_model(source, "rg10", seed=seed).model for seed in (1, 1, 2))
    np.testing.assert_array_equal(last_logits(first), last_logits(again))
    assert np.abs(last_logits(first) - last_logits(other)).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen3-vl-4b", "qwen3-vl-8b"])
def test_named_models_have_published_gates_and_no_shape(name: str) -> None:
    assert MODELS[name].family == "qwen3_vl"
    assert MODELS[name].gates["rg10"] == f"ngocbh/DBTrimKV-{MODELS[name].repo.removeprefix('Qwen/')}"
    with pytest.raises(ModelError, match=f"the shape of {name} is not part of this package: add --weights DIR"):
        find_source(name, random_weights=True, vision=True)


def test_commands_for_text_refuse_it_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (str(folder), "qwen3-vl-4b"):
        with pytest.raises(SystemExit) as stopped:
            evaluate(["--model", model, "--budgets", "64", "-o", str(tmp_path / "out")])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "qwen3-vl models read pictures" in line
        assert "this command is for text models: choose one" in line
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_vl_moe").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'qwen3_vl_moe' is not supported; supported families: .*qwen3_vl"):
        find_source(str(tmp_path), random_weights=True, vision=True)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"out_hidden_size": 32}, "rows of width 32, but its decoder has width 64"),
        ("text_config", {"num_hidden_layers": 1}, "in its first 2 layers, but its decoder has 1"),
        ("text_config", {"layer_types": ["sliding_attention"] * 3}, "sliding-window layers"),
    ],
)
def test_damaged_configurations_are_refused(
    part: str, change: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=message):
        find_source(str(tmp_path), random_weights=True, vision=True)


@pytest.mark.parametrize(
    ("kind", "pixels", "grid", "message"),
    [
        ("images", (8, PATCH_VALUES), [[2, 2, 2]], "an image has 1 frame group"),
        ("images", (6, PATCH_VALUES), [[1, 2, 3]], "multiples of 2"),
        ("images", (0, PATCH_VALUES), [[1, 0, 2]], "must be positive"),
        ("images", (4, PATCH_VALUES), [1, 2, 2], r"give int64 \[pictures, 3\]"),
        ("videos", (4, PATCH_VALUES), [[2, 2, 2]], r"need \[8, 96\]"),
        ("images", (4, PATCH_VALUES // 3), [[1, 2, 2]], r"3 channels need \[4, 96\]"),
    ],
)
def test_pixels_that_fit_no_grid_are_refused(kind: str, pixels: tuple, grid: list, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        getattr(gated_vision_model(), kind)(torch.zeros(pixels), torch.tensor(grid))
