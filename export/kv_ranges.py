"""Scales of an int8 KV cache, from the keys and values of a sample text under full attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.kv_scales import LEVELS, KVScales
from trimkv_edge.models.attention import BACKEND_KEYWORD

SAMPLE_TOKENS = 512  # of text, and as many of any kind
# Room for texts with larger numbers than the sample; costs a tenth of a level.
_MARGIN = 1.1


class _Ranges:
    """Full causal attention over one chunk; remembers the largest numbers of a layer."""

    def __init__(self, rotary: int) -> None:
        self._half = rotary // 2
        self.key = self.value = torch.zeros(0)

    def retain(self, layer: int, log_beta: Tensor) -> None:
        """Log-betas stay float32."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        half = self._half
        # A pair of rotated channels can turn into either one at another position.
        pair = torch.hypot(key[..., :half], key[..., half : 2 * half])
        spread = torch.cat([pair, pair, key[..., 2 * half :].abs()], -1)
        self.key, self.value = spread.amax((0, 2)), value.abs().amax((0, 2))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


@torch.no_grad()
def measure_scales(
    weights: ReferenceWeights, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> KVScales:
    """Reads ``tokens`` once, one layer in memory at a time.

    Args:
        weights: of the model as it will run.
        tokens: a sample of what will be read.
        progress: called with (layers done, layers in all).
    """
    inner = weights.model.base.model
    stream = torch.tensor([list(tokens)])
    hidden = weights.fill(inner.embed_tokens)(stream)
    angles = inner.rotary_emb(hidden, position_ids=torch.arange(stream.shape[1]).unsqueeze(0))
    keys, values = [], []
    for index, layer in enumerate(inner.layers):
        ranges = _Ranges(angles[0].shape[-1])
        hidden = weights.fill(layer)(hidden, position_embeddings=angles, **{BACKEND_KEYWORD: ranges})
        keys.append(ranges.key)
        values.append(ranges.value)
        if progress:
            progress(index + 1, len(inner.layers))
    key, value = (
        np.maximum(torch.stack(x).numpy() * np.float32(_MARGIN / LEVELS), np.float32(1e-8)) for x in (keys, values)
    )
    return KVScales(key, value)
