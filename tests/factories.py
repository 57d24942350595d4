"""Small random models of every family, shared by tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, random_gates
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.rope import fix_rope

VOCAB = 320
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}
LONGROPE_ORIGINAL = 32

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-gqa": ("qwen3", dict(head_dim=32)),
    "llama-gqa": ("llama", {}),
    "llama3-rope": (
        "llama",
        dict(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
    ),
    "phi3-mha": ("phi3", dict(num_key_value_heads=4)),
    "phi3-partial-rotary": (
        "phi3",
        dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ),
    "phi3-longrope": (
        "phi3",
        dict(
            original_max_position_embeddings=LONGROPE_ORIGINAL,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": LONGROPE_ORIGINAL,
                **_FACTORS,
            },
        ),
    ),
}


def base_config(case: str, **more: Any) -> Any:
    """transformers configuration of a case of ``CONFIGS``."""
    model_type, special = CONFIGS[case]
    return AutoConfig.for_model(model_type, **{**_COMMON, **special, **more})


def base_model(case: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A plain transformers model with seeded random weights, float32, wide enough logits to have clear winners."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(base_config(case, **more), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def gated_model(case: str, kind: str = "rg", seed: int = 0, rope: str = "auto", **more: Any) -> GatedModel:
    """The same weights with random gates whose log-betas are spread; ``more``: as for :func:`base_config`."""
    base = base_model(case, seed, **more)
    fix_rope(base, rope)
    return GatedModel(base, random_gates(kind, GateShape.of(base.config), 24, seed)).eval().requires_grad_(False)


IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 316, 317, 318, 319
PATCH_VALUES = 3 * 2 * 4 * 4  # channels, frames, height and width of a patch


def vision_config(**text: Any) -> Any:
    """Qwen3-VL in small: 3 decoder layers with M-RoPE on 3 axes, DeepStack features in the first 2."""
    decoder = {**_COMMON, "num_hidden_layers": 3, "head_dim": 16, **text}
    decoder["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    encoder = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        out_hidden_size=decoder["hidden_size"],
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return AutoConfig.for_model(
        "qwen3_vl",
        text_config=decoder,
        vision_config=encoder,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def vision_base(seed: int = 0, **text: Any) -> PreTrainedModel:
    """As :func:`base_model`, for pictures too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(vision_config(**text), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def gated_vision_model(kind: str = "rg", seed: int = 0, **text: Any) -> GatedVisionModel:
    """As :func:`gated_model`, for pictures too."""
    base = vision_base(seed, **text)
    return GatedVisionModel(base, random_gates(kind, GateShape.of(base.config), 24, seed)).eval().requires_grad_(False)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Seeded token ids below ``VOCAB``."""
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
