"""Mixed dialogues of `tiny-vl`: exact in length, placed as the engine places them, and fed to the network unchanged."""

import random
import re

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from trimkv_edge.engine import Cursor
from trimkv_edge.mixed_stream import place
from trimkv_edge.models.tiny.data import ANSWER
from trimkv_edge.models.tiny.words import KEYS
from trimkv_edge.models.tiny_vl.batches import positions_of, to_batch
from trimkv_edge.models.tiny_vl.dialogues import ROW, SEEN, Mixed, mixed_dialogue
from trimkv_edge.models.tiny_vl.forward import embed, last_hidden
from trimkv_edge.models.tiny_vl.late import crowded_dialogue, late_dialogue, rounds_dialogue
from trimkv_edge.models.tiny_vl.network import config, encode, set_attention
from trimkv_edge.models.tiny_vl.patches import cut_many
from trimkv_edge.models.tiny_vl.scenes import SIZES, Scene, draw, random_scene
from trimkv_edge.models.tiny_vl.tokenizer import IMAGE_PAD, VIDEO_PAD, WEIGHTS, load_tokenizer
from trimkv_edge.pictures import IMAGE, VIDEO, Picture
from trimkv_edge.runtime.picture_patches import PatchSettings, cut

SCENE = Scene("red", "star", "4", "left", 64, 96, 11)


@pytest.fixture(scope="module")
def network() -> Qwen3VLForConditionalGeneration:
    """Random weights, DeepStack included."""
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config()).eval()
    set_attention(model)
    return model


def text_of(ids: list[int]) -> str:
    return load_tokenizer().decode(ids, skip_special_tokens=False)


def conversation() -> Mixed:
    dialogue = Mixed()
    dialogue.state({"gate": "lion"})
    dialogue.show("tent", SCENE)
    dialogue.ask("gate")
    dialogue.show("oven", random_scene(random.Random(3), (32, 64)), groups=2)
    dialogue.ask_about("tent", "shape")
    return dialogue


def test_a_conversation_reads_like_the_chat_template() -> None:
    text = text_of(conversation().ids[:72])
    rows = IMAGE_PAD * 24
    assert text.startswith(
        "<|im_start|>user\nRemember: the gate is lion.<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n"
        f"<|im_start|>user\nLook at the tent<|vision_start|>{rows}<|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n<|im_start|>user\nWhat is the gate?"
    )
    whole = text_of(conversation().ids)
    assert f"<|vision_start|>{VIDEO_PAD * 8}<|vision_end|><|vision_start|>{VIDEO_PAD * 8}<|vision_end|>" in whole
    assert whole.endswith("What shape is the tent?<|im_end|>\n<|im_start|>assistant\nThe tent is star.<|im_end|>\n")
    assert load_tokenizer().encode(whole).ids == conversation().ids


@pytest.mark.parametrize("seed", range(6))
def test_mixed_dialogues_are_exact_and_keep_pictures_whole(seed: int) -> None:
    dialogue = mixed_dialogue(random.Random(seed), 384, 5, 5, held_out=True)
    assert len(dialogue.ids) == len(dialogue.kinds) == 384
    rows = np.array(dialogue.kinds) == ROW
    pads = [load_tokenizer().token_to_id(name) for name in (IMAGE_PAD, VIDEO_PAD)]
    assert np.array_equal(rows, np.isin(dialogue.ids, pads))
    assert rows.sum() == sum(picture.height * picture.width for picture in dialogue.shown)
    assert all(rows[picture.start : picture.start + picture.height * picture.width].all() for picture in dialogue.shown)


def test_late_dialogues_ask_last_and_about_both() -> None:
    dialogue = late_dialogue(random.Random(2), 1024, 4, 4, 8, others=6, held_out=True)
    kinds = dialogue.kinds
    assert len(kinds) == len(dialogue.ids) == 1024
    assert (kinds.count(SEEN), kinds.count(ANSWER)) == (4, 4)
    end = dialogue.text[2]
    assert not {SEEN, ANSWER} & set(kinds[:end])
    asked = re.findall(r"(?:What \w+|What|Where) is the (\w+)\?", text_of(dialogue.ids[end:]))
    said = text_of(dialogue.ids[:400])
    assert len(asked) == 8
    assert all(f"the {key}" in said for key in asked)
    assert len(re.findall("|".join(f"Look at the {key}" for key in KEYS), text_of(dialogue.ids))) == 10
    with pytest.raises(ValueError, match="too few"):
        late_dialogue(random.Random(2), 128, 4, 4, 8)


@pytest.mark.parametrize("seed", range(5))
def test_rounds_ask_about_what_their_round_showed_or_said(seed: int) -> None:
    dialogue, texts = rounds_dialogue(random.Random(seed), 640, held_out=True)
    kinds = dialogue.kinds
    assert len(kinds) == len(dialogue.ids) == 640
    rows = sum(shown.height * shown.width for shown in dialogue.shown)
    assert kinds.count(ROW) == rows
    before = 0
    for start, end in texts:
        assert not {SEEN, ANSWER, ROW} & set(kinds[start:end])
        said = text_of(dialogue.ids[before:start])
        asked = re.findall(r"(?:What \w+|What|Where) is the (\w+)\?", said)
        assert not before or len(asked) >= 4
        before = end
    asked = re.findall(r"(?:What \w+|What|Where) is the (\w+)\?", text_of(dialogue.ids[: texts[-1][0]]))
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("seed", range(5))
def test_crowded_dialogues_go_on_after_what_is_asked_for(seed: int) -> None:
    dialogue, (start, resume, end) = crowded_dialogue(random.Random(seed), 704, 6, held_out=True)
    kinds = dialogue.kinds
    assert len(kinds) == len(dialogue.ids) == 704
    assert 0 < start < resume <= end < 704
    assert not {SEEN, ANSWER} & set(kinds[:end])
    assert kinds.count(SEEN) + kinds.count(ANSWER) == 6
    asked = re.findall(r"(?:What \w+|What|Where) is the (\w+)\?", text_of(dialogue.ids[end:]))
    early, later = text_of(dialogue.ids[:start]), text_of(dialogue.ids[start:end])
    assert all(f"the {key}" in early and f"at the {key}" not in later for key in asked)
    assert "Look at the" in later or "Remember: the" in later


def test_positions_are_the_engines() -> None:
    dialogue = conversation()
    waiting = [
        Picture(kind, shown.height, shown.width, np.zeros((n, 2), np.float32), np.zeros((1, n, 2), np.float32))
        for shown, kind in zip(dialogue.shown, (IMAGE, VIDEO, VIDEO), strict=True)
        for n in (shown.height * shown.width,)
    ]
    ids = load_tokenizer().token_to_id
    placed = place(np.array(dialogue.ids), Cursor(), waiting, {ids(IMAGE_PAD): IMAGE, ids(VIDEO_PAD): VIDEO})
    assert np.array_equal(positions_of(dialogue, np.zeros(len(dialogue.ids), np.int64)), placed.rows.positions)


def test_jumps_never_split_a_picture() -> None:
    rng = random.Random(4)
    dialogues = [mixed_dialogue(rng, 192, 3, 3, held_out=True) for _ in range(6)]
    batch = to_batch(rng, dialogues, jump_share=1.0)
    plain = to_batch(rng, dialogues, jump_share=0.0)
    offset = batch.positions - plain.positions
    assert (offset[0] == offset[1]).all()
    assert (offset[0] == offset[2]).all()
    assert (offset[0].diff(dim=1) >= 0).all()
    assert offset.max() > 1000
    for row, shown in batch.shown:
        part = offset[0, row, shown.start - 1 : shown.start + shown.height * shown.width + 1]
        assert (part == part[0]).all()


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_cut_as_in_the_runtime(size: tuple[int, int]) -> None:
    image = draw(random_scene(random.Random(1), size))
    want = cut(image, PatchSettings.load(WEIGHTS))
    patches, down, across = cut_many(np.asarray(image)[None, None].copy())
    assert want.grid_thw.tolist() == [[1, down, across]]
    assert np.abs(patches[0].numpy() - want.pixel_values).max() < 1e-6


def test_many_pictures_at_once_are_encoded_as_one_by_one(network) -> None:
    images = [np.asarray(draw(random_scene(random.Random(seed), (64, 96)))) for seed in range(3)]
    patches, down, across = cut_many(np.stack(images)[:, None])
    with torch.no_grad():
        rows, deepstack = encode(network.model.visual, patches, down, across)
        want = network.model.get_image_features(
            patches.flatten(0, 1), torch.tensor([[1, down, across]] * 3), return_dict=True
        )
    for number in range(3):
        assert (want.pooler_output[number] - rows[number]).abs().max() < 1e-4
        for layer in range(2):
            assert (want.deepstack_features[layer][number] - deepstack[layer, number]).abs().max() < 1e-4


def test_rows_of_training_equal_transformers_own_pass(network) -> None:
    dialogue = Mixed()
    dialogue.show("tent", SCENE)
    dialogue.ask_about("tent", "number")
    dialogue.show("gate", random_scene(random.Random(3), (32, 64)))
    dialogue.ask_about("gate", "colour")
    batch = to_batch(random.Random(0), [dialogue], 0.0)
    cuts = [cut_many(shown.pixels[None]) for _, shown in batch.shown]
    with torch.no_grad():
        logits = network.lm_head(last_hidden(network, batch, embed(network, batch)))
        want = network(
            input_ids=batch.ids,
            pixel_values=torch.cat([patches[0] for patches, _, _ in cuts]),
            image_grid_thw=torch.tensor([[1, down, across] for _, down, across in cuts]),
            mm_token_type_ids=(batch.kinds == ROW).int(),
        ).logits
    assert (logits - want).abs().max() < 1e-3 * want.abs().max()
