"""transformers' own modules in eager PyTorch. Options: cache (dynamic, static), dtype, compile (yes, no)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

_PIECE = 512  # tokens per forward: the mask of a longer one would not fit beside a 32k context


def build(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    """Nothing to make: the weights are read as they are."""
    for path in [weights / "config.json", *weights.glob("model*")]:
        (output / path.name).symlink_to(path.resolve())


class Model(protocol.Model):
    @torch.no_grad()
    def __init__(self, folder: Path, threads: int, length: int, options: dict[str, str]) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        self._options, self._length = options, length
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options["dtype"])).eval()
        self.vocabulary = self._model.config.vocab_size
        self._decode = torch.compile(self._forward, dynamic=False) if options["compile"] == "yes" else self._forward
        self._static = StaticCache(self._model.config, max_cache_len=length) if options["cache"] == "static" else None
        self.reset()
        if options["compile"] == "yes":  # compilation is part of loading
            self.feed([3])
            self.step()
            self.reset()

    def reset(self) -> None:
        if self._static is not None:
            self._static.reset()
        self._cache = self._static or DynamicCache(config=self._model.config)
        self._seen = 0
        self._logits = torch.zeros(self.vocabulary)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._model(
            ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]

    @torch.no_grad()
    def _read(self, tokens: list[int], forward: Any) -> None:
        positions = torch.arange(self._seen, self._seen + len(tokens))[None]
        self._logits = forward(torch.tensor([tokens]), positions).float()
        self._seen += len(tokens)

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), _PIECE):
            self._read(tokens[start : start + _PIECE], self._forward)

    def step(self) -> int:
        token = int(self._logits.argmax())
        self._read([token], self._decode)
        return token

    def logits(self) -> np.ndarray:
        return self._logits.numpy()

    def about(self) -> dict[str, Any]:
        names = ("torch", "transformers")
        return {"versions": {name: version(name) for name in names}, "cache": self._options["dtype"]}


if __name__ == "__main__":
    protocol.run(build, Model)
