"""Qwen3-VL (dense): Qwen3's decoder with interleaved M-RoPE, and DeepStack features from its vision encoder."""

from __future__ import annotations

from typing import Any

from trimkv_edge.errors import ModelError
from trimkv_edge.models.family import Family, refuse_sliding_layers, text_config


def _check(config: Any) -> None:
    text, vision = text_config(config), config.vision_config
    refuse_sliding_layers(text)
    features = len(vision.deepstack_visual_indexes)
    if features > text.num_hidden_layers:
        raise ModelError(
            f"this {config.model_type} model adds DeepStack features in its first {features} layers, but its decoder "
            f"has {text.num_hidden_layers}: config.json is damaged"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ModelError(
            f"this {config.model_type} model has picture rows of width {vision.out_hidden_size}, but its decoder has "
            f"width {text.hidden_size}: config.json is damaged"
        )


FAMILY = Family(
    name="qwen3-vl",
    model_type="qwen3_vl",
    gate_intermediate_size=512,
    check=_check,
    auto_class="AutoModelForImageTextToText",
    vision=True,
)
