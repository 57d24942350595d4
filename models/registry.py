"""Families and named models. A name is a hub id, the published gates for it, and its shape for offline work."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from trimkv_edge.errors import ModelError
from trimkv_edge.models import llama, phi3, qwen3, qwen3_vl
from trimkv_edge.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        phi3.FAMILY,
        qwen3.FAMILY,
        qwen3_vl.FAMILY,
    )
}


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name.

    Attributes:
        repo: hub id of the base, empty for a model that ships with the package, in a folder of its name.
        family: ``model_type``.
        gates: published gates by kind (``rg``, ``rg10``), hub ids; empty where none were published. ``tiny`` has a set
            more, ``rg-chat``, of kind ``rg``.
        shape: the fields of the hub's ``config.json``, spelled as there, for ``--random-weights``; empty where they are
            not known to the letter.
        stops: ``eos_token_id`` of its ``generation_config.json``.
    """

    repo: str
    family: str
    gates: dict[str, str] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    def fields(self, **other: Any) -> dict[str, Any]:
        """A copy of ``shape``, some fields replaced: transformers completes the dictionaries that it is given."""
        return {**copy.deepcopy(self.shape), **other}


_PHI3_STOPS = [32000, 32001, 32007]
_QWEN3_STOPS = [151645, 151643]
_LLAMA32_STOPS = [128001, 128008, 128009]


def _phi3(limit: int, window: int, rope_scaling: dict[str, Any] | None) -> dict[str, Any]:
    return dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=1,
        embd_pdrop=0.0,
        eos_token_id=32000,
        hidden_act="silu",
        hidden_size=3072,
        initializer_range=0.02,
        intermediate_size=8192,
        max_position_embeddings=limit,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        original_max_position_embeddings=4096,
        pad_token_id=32000,
        resid_pdrop=0.0,
        rms_norm_eps=1e-5,
        rope_scaling=rope_scaling,
        rope_theta=10000.0,
        sliding_window=window,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        vocab_size=32064,
    )


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=hidden,
        initializer_range=0.02,
        intermediate_size=inner,
        max_position_embeddings=40960,
        max_window_layers=layers,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=8,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
        use_cache=True,
        use_sliding_window=False,
        vocab_size=151936,
    )


def _llama3(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    head_dim: int,
    factor: float,
    tied: bool,
    eos: int | list[int],
) -> dict[str, Any]:
    return dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=eos,
        head_dim=head_dim,
        hidden_act="silu",
        hidden_size=hidden,
        initializer_range=0.02,
        intermediate_size=inner,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-5,
        rope_scaling={
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
        use_cache=True,
        vocab_size=128256,
    )


MODELS: dict[str, NamedModel] = {
    "tiny": NamedModel("", "qwen3", {"rg": "rg", "rg10": "rg10", "rg-chat": "rg-chat"}),
    "tiny-vl": NamedModel("", "qwen3_vl", {"rg10": "rg10", "rg10-chat": "rg10-chat"}),
    "phi-3-mini": NamedModel(
        "microsoft/Phi-3-mini-128k-instruct",
        "phi3",
        {"rg": "ngocbh/TrimKV-Phi-3-mini-128k-instruct"},
        _phi3(131072, 262144, phi3.MINI_128K_ROPE),
        _PHI3_STOPS,
    ),
    "phi-3-mini-4k": NamedModel("microsoft/Phi-3-mini-4k-instruct", "phi3", {}, _phi3(4096, 2047, None), _PHI3_STOPS),
    "qwen3-0.6b": NamedModel("Qwen/Qwen3-0.6B", "qwen3", {}, _qwen3(1024, 3072, 28, 16, True), _QWEN3_STOPS),
    "qwen3-1.7b": NamedModel(
        "Qwen/Qwen3-1.7B",
        "qwen3",
        {"rg": "ngocbh/TrimKV-Qwen3-1.7B-Math"},
        _qwen3(2048, 6144, 28, 16, True),
        _QWEN3_STOPS,
    ),
    "qwen3-4b": NamedModel(
        "Qwen/Qwen3-4B",
        "qwen3",
        {"rg": "ngocbh/TrimKV-Qwen3-4B-Math", "rg10": "ngocbh/DBTrimKV-Qwen3-4B-Math"},
        _qwen3(2560, 9728, 36, 32, True),
        _QWEN3_STOPS,
    ),
    "qwen3-8b": NamedModel(
        "Qwen/Qwen3-8B",
        "qwen3",
        {"rg": "ngocbh/TrimKV-Qwen3-8B-Math"},
        _qwen3(4096, 12288, 36, 32, False),
        _QWEN3_STOPS,
    ),
    "qwen3-14b": NamedModel(
        "Qwen/Qwen3-14B",
        "qwen3",
        {"rg": "ngocbh/TrimKV-Qwen3-14B-Math"},
        _qwen3(5120, 17408, 40, 40, False),
        _QWEN3_STOPS,
    ),
    "qwen3-vl-4b": NamedModel(
        "Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", {"rg10": "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct"}
    ),
    "qwen3-vl-8b": NamedModel(
        "Qwen/Qwen3-VL-8B-Thinking", "qwen3_vl", {"rg10": "ngocbh/DBTrimKV-Qwen3-VL-8B-Thinking"}
    ),
    "llama-3.2-1b": NamedModel(
        "meta-llama/Llama-3.2-1B-Instruct",
        "llama",
        {},
        _llama3(2048, 8192, 16, 32, 64, 32.0, True, _LLAMA32_STOPS),
        _LLAMA32_STOPS,
    ),
    "llama-3.2-3b": NamedModel(
        "meta-llama/Llama-3.2-3B-Instruct",
        "llama",
        {},
        _llama3(3072, 8192, 28, 24, 128, 32.0, True, _LLAMA32_STOPS),
        _LLAMA32_STOPS,
    ),
    "r1-distill-llama-8b": NamedModel(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "llama",
        {"rg": "ngocbh/TrimKV-DeepSeek-R1-Distill-Llama-8B"},
        _llama3(4096, 14336, 32, 32, 128, 8.0, False, 128001),
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a transformers ``model_type``; raises :class:`ModelError` naming the supported ones."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(f"model type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}")
    return family
