"""optimum-executorch: Hugging Face's own export to ExecuTorch and its own runtime class. Options: length."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import protocol

_PIECE = 512
_SCHEMES = {"none": [], "8da4w": ["--qlinear", "8da4w", "--qembedding", "8w"]}


def build(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    """The cache is allocated for ``length`` tokens: that is fixed here, at export."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "executorch"]
    command += ["--model", str(weights.resolve()), "--task", "text-generation", "--recipe", "xnnpack"]
    command += ["--use_custom_sdpa", "--use_custom_kv_cache", "--dtype", "float32", *_SCHEMES[quant]]
    command += ["--max_seq_len", options["length"], "--output_dir", str(output.resolve())]
    subprocess.run(command, check=True)
    (output / "config.json").write_text((weights / "config.json").read_text())


class Model(protocol.Model):
    def __init__(self, folder: Path, threads: int, length: int, options: dict[str, str]) -> None:
        super().__init__()
        import torch
        from executorch.extension.pybindings import portable_lib
        from optimum.executorch import ExecuTorchModelForCausalLM

        self._torch = torch
        torch.set_num_threads(threads)
        portable_lib._unsafe_reset_threadpool(threads)
        self._model = ExecuTorchModelForCausalLM.from_pretrained(folder)
        self.vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.reset()

    def reset(self) -> None:
        self._seen = 0  # what lies behind the position is not attended to
        self._logits = np.zeros(self.vocabulary, np.float32)

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), _PIECE):
            piece = tokens[start : start + _PIECE]
            positions = self._torch.arange(self._seen, self._seen + len(piece))
            logits = self._model.forward(self._torch.tensor([piece]), positions)
            self._logits = logits.reshape(-1, self.vocabulary)[-1].numpy()
            self._seen += len(piece)

    def step(self) -> int:
        token = int(self._logits.argmax())
        self.feed([token])
        return token

    def logits(self) -> np.ndarray:
        return self._logits

    def about(self) -> dict[str, Any]:
        names = ("optimum-executorch", "executorch", "torch", "transformers")
        return {"versions": {name: version(name) for name in names}, "cache": "float32"}


if __name__ == "__main__":
    protocol.run(build, Model)
