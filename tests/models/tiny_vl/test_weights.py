"""What ships with `tiny-vl`: loads everywhere it has to, is small, sees, and recalls both modalities in one budget."""

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from trimkv_edge.config import CacheConfig
from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.tiny.tokenizer import WEIGHTS as TINY_WEIGHTS
from trimkv_edge.models.tiny.words import KEYS, VALUES
from trimkv_edge.models.tiny_vl import data, evaluate
from trimkv_edge.models.tiny_vl.patches import save_settings
from trimkv_edge.models.tiny_vl.scenes import ATTRIBUTES, SIZES, draw, random_scene
from trimkv_edge.models.tiny_vl.tokenizer import WEIGHTS
from trimkv_edge.models.vision_engine import vision_engine
from trimkv_edge.runtime.picture_patches import PatchSettings, cut

FOLDER = WEIGHTS.parent
CONTENT = [{"type": "text", "text": "Look at the gate"}, {"type": "image", "image": "x.png"}]


@pytest.fixture(scope="module")
def model():
    return evaluate.load("rg10")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_everything_shipped_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20


def test_transformers_loads_all_of_it(tokenizer, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32)
    assert model.config.model_type == "qwen3_vl"
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    assert ids["image_pad"] == model.config.image_token_id
    assert ids["video_pad"] == model.config.video_token_id
    assert ids["vision_start"] == model.config.vision_start_token_id
    processor = AutoImageProcessor.from_pretrained(WEIGHTS)
    image = draw(random_scene(random.Random(0), (64, 96)))
    given = processor(images=[image], return_tensors="np")
    ours = cut(image, PatchSettings.load(WEIGHTS))
    assert np.array_equal(given["image_grid_thw"], ours.grid_thw)
    assert np.abs(given["pixel_values"] - ours.pixel_values).max() < 1e-5
    save_settings(tmp_path)
    assert PatchSettings.load(WEIGHTS) == PatchSettings.load(tmp_path)
    assert PatchSettings.load(WEIGHTS) == PatchSettings(8, 2, 2, 32 * 32, 96 * 64)


def test_chat_template(tokenizer) -> None:
    def chat(*messages: dict[str, object]) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Noted."}]
    assert chat(*plain) == AutoTokenizer.from_pretrained(TINY_WEIGHTS).apply_chat_template(
        plain, tokenize=False, add_generation_prompt=True
    )
    assert chat({"role": "user", "content": CONTENT}) == (
        "<|im_start|>user\nLook at the gate<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    video = [{"type": "video", "video": "x"}, {"type": "text", "text": "Hi"}]
    assert "user\n<|vision_start|><|video_pad|><|vision_end|>Hi<|im_end|>" in chat({"role": "user", "content": video})


def test_words_are_one_token_and_tinys_keep_their_ids() -> None:
    ours, tinys = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (WEIGHTS, TINY_WEIGHTS))
    words = [*KEYS, *VALUES, *ATTRIBUTES, *(word for words in ATTRIBUTES.values() for word in words)]
    assert all(len(ours.encode(" " + word).ids) == 1 for word in words)
    assert all(ours.encode(" " + word).ids == tinys.encode(" " + word).ids for word in KEYS + VALUES)
    text = 'def right(self):\n    return "the left value, über 17 red squares"\n'
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_gates_belong_to_the_base(model) -> None:
    info = json.loads((FOLDER / "gates" / "rg10.json").read_text())
    assert info["base_sha256"] == file_sha256(WEIGHTS / "model.safetensors")
    assert (info["kind"], info["training"]["scope"]) == ("rg10", "global")
    assert len(model.gates) == info["num_layers"] == 4
    assert model.gates[0].bias is model.gates[1].bias


@pytest.mark.parametrize("size", SIZES)
def test_sees_what_a_picture_shows(model, tokenizer, size: tuple[int, int]) -> None:
    """Pictures of seeds that training never drew; messages go through the template, pixels through the runtime."""
    right = asked = 0
    for seed in range(4):
        scene = random_scene(random.Random(f"held out {seed}"), size)
        patches = cut(draw(scene), PatchSettings.load(WEIGHTS))
        for attribute in data.answers(scene):
            messages = [
                {"role": "user", "content": CONTENT},
                {"role": "assistant", "content": "Noted."},
                {"role": "user", "content": data.question("gate", attribute)},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "The gate is"
            text = text.replace("<|image_pad|>", "<|image_pad|>" * (size[0] * size[1] // 256))
            ids = tokenizer(text)["input_ids"]
            engine = vision_engine(model, CacheConfig(budget=len(ids), buffer=128, prefill_chunk=len(ids)))
            engine.show(engine.encode("image", patches.pixel_values, patches.grid_thw))
            answer = int(engine.prefill(ids).argmax())
            right += tokenizer.decode([answer]).strip() == scene.answer(attribute)
            asked += 1
    assert right >= 0.85 * asked


def test_recall_of_both_modalities_in_one_budget(model) -> None:
    """Questions come last; a window of the same size has lost all of it."""
    budgets = {
        "full": CacheConfig(1024, 128, 128),
        "global": CacheConfig(64, 32, 32, "global"),
        "window": CacheConfig(64, 32, 32, "streaming", sinks=4),
    }
    dialogues = [evaluate.stream(1000 + seed, 1024) for seed in range(4)]
    share = {}
    for name, config in budgets.items():
        engine = vision_engine(model, config)
        runs = [evaluate.read(engine, dialogue, evaluate.pictures_of(model, dialogue)) for dialogue in dialogues]
        for modality in ("picture", "text"):
            answers = [answer for right, _ in runs for answer in right[modality]]
            assert len(answers) == 20
            share[name, modality] = sum(answers) / len(answers)
    for modality in ("picture", "text"):
        assert share["full", modality] >= 0.85
        assert share["global", modality] >= share["window", modality] + 0.4
