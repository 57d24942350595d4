"""The `tiny-vl` network: transformers' Qwen3-VL around `tiny`'s trained decoder, with a small vision encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from trimkv_edge.models.picture_encoder import size_tables
from trimkv_edge.models.tiny.network import ATTENTION
from trimkv_edge.models.tiny.network import config as tiny_config
from trimkv_edge.models.tiny.tokenizer import WEIGHTS as TINY_WEIGHTS
from trimkv_edge.models.tiny.words import VALUES
from trimkv_edge.models.tiny_vl.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, load_tokenizer

VOCAB_SIZE = 2088
MROPE_SECTION = [12, 10, 10]


def config() -> Qwen3VLConfig:
    """`tiny`'s decoder with M-RoPE; patches of 8 pixels, 3 encoder layers of width 64, DeepStack from the first two."""
    text = tiny_config()
    ids = load_tokenizer().token_to_id
    fields: dict[str, Any] = dict(
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e8,
                "mrope_section": MROPE_SECTION,
                "mrope_interleaved": True,
            },
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.05,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=64,
            intermediate_size=192,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=text.hidden_size,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
            initializer_range=0.05,
        ),
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids(VIDEO_PAD),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen3VLConfig(**fields)


def new_model() -> Qwen3VLForConditionalGeneration:
    """The network before its training: `tiny`'s decoder, new words that look like its values, DeepStack silent."""
    model = Qwen3VLForConditionalGeneration(config())
    set_attention(model)
    tiny = AutoModelForCausalLM.from_pretrained(TINY_WEIGHTS, dtype=torch.float32)
    state = tiny.model.state_dict()
    known = state.pop("embed_tokens.weight")
    decoder = model.model.language_model
    decoder.load_state_dict(state, strict=False)
    values = known[[load_tokenizer().token_to_id("Ġ" + word) for word in VALUES]]
    with torch.no_grad():
        table = decoder.embed_tokens.weight
        table.copy_(values.mean(0) + values.std(0) * torch.randn(table.shape))
        table[: len(known)] = known
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    model.tie_weights()
    return model


def set_attention(model: Any) -> None:
    """The decoder attends by index, see `tiny.network.causal_attention`."""
    model.model.language_model.config._attn_implementation = ATTENTION


def encode(visual: Any, patches: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    """The vision encoder on many pictures of one size at once, which transformers encodes one by one.

    patches [N, down * across, values], merged ones in a row -> rows [N, R, hidden], DeepStack [features, N, R, hidden].
    """
    merge = visual.config.spatial_merge_size
    positions, *angles = size_tables(visual, down, across, visual.pos_embed.weight)
    patch = visual.patch_embed.proj
    hidden = F.linear(patches, patch.weight.flatten(1), patch.bias) + positions
    features = []
    for number, block in enumerate(visual.blocks):
        hidden = hidden + _attend(block.attn, block.norm1(hidden), *angles)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if number in visual.deepstack_visual_indexes:
            features.append(visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)](hidden))
    shape = (len(patches), down * across // merge**2, -1)
    return visual.merger(hidden).view(shape), torch.stack(features).view(len(features), *shape)


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of `[N, P, D]`, every patch sees all of its own picture."""
    count, length, width = hidden.shape
    query, key, value = attention.qkv(hidden).view(count, length, 3, attention.num_heads, -1).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    merged: Tensor = attention.proj(out.transpose(1, 2).reshape(count, length, width))
    return merged
