"""onnxruntime-genai: its own model builder and its own generator. No options."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import protocol

_PIECE = 2048  # tokens per append: attention's workspace grows with it


def build(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    precision = {"none": "fp32", "int4": "int4"}[quant]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(weights.resolve())]
    command += ["-o", str(output.resolve()), "-p", precision, "-e", "cpu", "-c", str(output.resolve() / "cache")]
    subprocess.run(command, check=True)
    # For type "phi3" the generator computes the whole stream again at token 4,097, where LongRoPE changes its factors.
    # These weights have none.
    path = output / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["type"] = "llama"
    path.write_text(json.dumps(config, indent=4))


class Model(protocol.Model):
    def __init__(self, folder: Path, threads: int, length: int, options: dict[str, str]) -> None:
        super().__init__()
        import onnxruntime_genai as og

        self._library = og
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._length = length
        settings = json.loads((folder / "genai_config.json").read_text())
        self.vocabulary = settings["model"]["vocab_size"]
        self.reset()

    def reset(self) -> None:
        self._generator = None  # its cache goes before another is allocated
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), _PIECE):
            self._generator.append_tokens(np.asarray(tokens[start : start + _PIECE], np.int32))

    def step(self) -> int:
        # The first call after an append only chooses; each later one reads the token chosen before.
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self) -> np.ndarray:
        return np.asarray(self._generator.get_logits()).reshape(-1, self.vocabulary)[-1]

    def about(self) -> dict[str, Any]:
        names = ("onnxruntime-genai", "onnxruntime")
        return {"versions": {name: version(name) for name in names}, "cache": "float32"}


if __name__ == "__main__":
    protocol.run(build, Model)
