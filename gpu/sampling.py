"""Choosing the next tokens of a batch on the device, so that nothing waits for the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.sampling import SamplingParams


class DeviceSampler:
    """Draws a token for every stream; two with the same parameters and a seed draw the same on the same device.

    Args:
        params: temperature, top-k and min-p as in :class:`~trimkv_edge.runtime.sampling.Sampler`, and the seed.
        device: of the logits.

    Raises:
        ConfigError: top-p or a repetition penalty, which are not drawn on the device.
    """

    def __init__(self, params: SamplingParams, device: torch.device | str = "cpu") -> None:
        if params.top_p != 1.0 or params.repetition_penalty != 1.0:
            raise ConfigError(
                "top-p and a repetition penalty are not drawn on the device: leave them out, or sample each token on "
                "the host (trimkv-run)"
            )
        self.params = params
        self._random = torch.Generator(device)
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Float32 ``[batch, vocab_size]`` -> int64 ``[batch]``."""
        params = self.params
        if params.temperature == 0:
            return logits.argmax(-1)
        scores = logits / params.temperature
        if 0 < params.top_k < scores.shape[-1]:
            worst = scores.topk(params.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < worst, -torch.inf)
        if params.min_p:
            least = scores.amax(-1, keepdim=True) + math.log(params.min_p)
            scores = scores.masked_fill(scores < least, -torch.inf)
        # The smallest of exponential times, each at the rate of its probability, falls to a token with its probability.
        waits = torch.empty_like(scores).exponential_(generator=self._random)
        return (scores.softmax(-1) / waits).argmax(-1)
