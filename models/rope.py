"""Rotary embeddings with one fixed set of frequencies.

transformers switches LongRoPE's factor set on the largest position it sees; keys already in a cache would keep the old
rotation, and the switch is data-dependent in a graph. One set is chosen at load and recorded.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimkv_edge.config import POSITION_LIMIT
from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.manifest import RopeInfo

ROPE_CHOICES = ("auto", "short", "long")
_STATIC_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


def fix_rope(base: Any, choice: str = "auto") -> RopeInfo:
    """Fixes the rotary frequencies of a transformers model in place.

    Args:
        base: the causal LM.
        choice: for LongRoPE models ``short``, ``long`` or ``auto`` (= ``long``: streams have no end); else ``auto``.

    Returns:
        what was chosen, and the first position it is not right for (``short``: the original training length).

    Raises:
        ConfigError: unknown choice, or a choice for a model without LongRoPE.
        ModelError: a rotary type whose frequencies depend on the length in another way.
    """
    if choice not in ROPE_CHOICES:
        raise ConfigError(f"rope variant {choice!r} is not known; use one of {', '.join(ROPE_CHOICES)}")
    rotary = base.model.rotary_emb
    if rotary.rope_type != "longrope":
        if choice != "auto":
            raise ConfigError(
                f"rope variant {choice!r} needs a LongRoPE model; this one uses {rotary.rope_type!r}: drop --rope"
            )
        if rotary.rope_type not in _STATIC_TYPES:
            raise ModelError(
                f"rope type {rotary.rope_type!r} changes with the length and is not supported; "
                f"supported: {', '.join((*_STATIC_TYPES, 'longrope'))}"
            )
        return RopeInfo("default", POSITION_LIMIT)
    original = int(base.config.rope_parameters["original_max_position_embeddings"])
    variant = "short" if choice == "short" else "long"
    length = original if variant == "short" else original + 1
    inv_freq, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        base.config, rotary.inv_freq.device, seq_len=length
    )
    rotary.inv_freq.copy_(inv_freq)
    # Any other name keeps transformers from choosing again in each forward pass.
    rotary.rope_type = f"longrope-{variant}"
    return RopeInfo(variant, original if variant == "short" else POSITION_LIMIT)
