"""Rotary embeddings with one fixed set of frequencies.

transformers switches LongRoPE's factor set on the largest position it sees; keys already in a cache would keep the old
rotation, and the switch is data-dependent in a graph. One set is chosen at load and recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimkv_edge.config import POSITION_LIMIT
from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.manifest import RopeInfo
from trimkv_edge.models.family import text_config, text_decoder

ROPE_CHOICES = ("auto", "short", "long")
_STATIC_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


def choose_rope(config: Any, choice: str = "auto", stream_length: int | None = None) -> RopeInfo:
    """Which rotary frequencies a model gets; needs no weights.

    Args:
        config: transformers configuration.
        choice: for LongRoPE models ``short``, ``long`` or ``auto``; else ``auto``.
        stream_length: most tokens that a stream will have, for LongRoPE models. ``auto`` is ``short`` if they are no
            more than the original training length, as in transformers, and ``long`` if they are more or not stated:
            streams have no end.

    Returns:
        what was chosen, and the first position it is not right for (``short``: the original training length).

    Raises:
        ConfigError: unknown choice, a length out of range, the two contradict each other, or they are for a model
            without LongRoPE.
        ModelError: a rotary type whose frequencies depend on the length in another way.
    """
    if choice not in ROPE_CHOICES:
        raise ConfigError(f"rope variant {choice!r} is not known; use one of {', '.join(ROPE_CHOICES)}")
    config = text_config(config)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "longrope":
        if choice != "auto":
            raise ConfigError(
                f"rope variant {choice!r} needs a LongRoPE model; this one uses {rope_type!r}: drop --rope"
            )
        if stream_length is not None:
            raise ConfigError(
                f"a stream length only chooses LongRoPE factors, and this model uses {rope_type!r}: "
                "drop --stream-length; every stream may be of any length"
            )
        if rope_type not in _STATIC_TYPES:
            raise ModelError(
                f"rope type {rope_type!r} changes with the length and is not supported; "
                f"supported: {', '.join((*_STATIC_TYPES, 'longrope'))}"
            )
        return RopeInfo("default", POSITION_LIMIT)
    if stream_length is not None and not 1 <= stream_length <= POSITION_LIMIT:
        raise ConfigError(
            f"stream length is {stream_length}, but must be 1 to {POSITION_LIMIT}, where angles stop being exact"
        )
    original = int(config.rope_parameters["original_max_position_embeddings"])
    within = stream_length is not None and stream_length <= original
    if choice == "short" and stream_length is not None and not within:
        raise ConfigError(
            f"the short LongRoPE factors are right for {original} tokens, but the stream length is {stream_length}: "
            "use --rope long, or a shorter --stream-length"
        )
    if choice == "short" or (choice == "auto" and within):
        return RopeInfo("short", original)
    return RopeInfo("long", POSITION_LIMIT)


def mrope_axes(rotary: Any) -> Tensor | None:
    """Which of M-RoPE's positions (0 time, 1 height, 2 width) turns each rotary pair, int64 ``[rotated / 2]``; None
    where a token has one position.

    Interleaved as in Qwen3-VL: every third pair from 1 on is height's and from 2 on width's, as many as
    ``mrope_section`` says; the rest is time's.
    """
    section = getattr(rotary, "mrope_section", None)
    if section is None:
        return None
    axes = torch.zeros(rotary.inv_freq.shape[0], dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def fix_rope(base: Any, choice: str = "auto", stream_length: int | None = None) -> RopeInfo:
    """Fixes the rotary frequencies of a transformers causal LM in place; see :func:`choose_rope`."""
    info = choose_rope(base.config, choice, stream_length)
    if info.variant != "default":
        rotary, config = text_decoder(base).rotary_emb, text_config(base.config)
        original = int(config.rope_parameters["original_max_position_embeddings"])
        inv_freq, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
            config, rotary.inv_freq.device, seq_len=original if info.variant == "short" else original + 1
        )
        rotary.inv_freq.copy_(inv_freq)
        # Any other name keeps transformers from choosing again in each forward pass.
        rotary.rope_type = f"longrope-{info.variant}"
    return info
