"""llama.cpp by llama-cpp-python: a GGUF of the same weights, quantised by llama.cpp. Options: flash (auto, off)."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import protocol
from gguf_file import write_gguf

_BATCH = 512
_SCHEMES = {"none": None, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def build(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    scheme = _SCHEMES[quant]
    if scheme is None:
        write_gguf(weights, output / "model.gguf", np.float32)
        return
    plain = output / "plain.gguf"
    write_gguf(weights, plain, np.float16)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = scheme
    failed = llama_cpp.llama_model_quantize(
        str(plain).encode(), str(output / "model.gguf").encode(), ctypes.byref(parameters)
    )
    if failed:
        raise SystemExit(f"llama_model_quantize failed with {failed}")
    plain.unlink()


class Model(protocol.Model):
    def __init__(self, folder: Path, threads: int, length: int, options: dict[str, str]) -> None:
        super().__init__()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {folder / 'model.gguf'}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = length
        if options["flash"] == "off":
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit(f"llama.cpp has no room for a context of {length} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._system = llama_cpp.llama_print_system_info().decode()

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), _BATCH):
            piece = tokens[start : start + _BATCH]
            ids = (llama_cpp.llama_token * len(piece))(*piece)
            failed = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(piece)))
            if failed:
                raise SystemExit(f"llama_decode failed with {failed}")

    def step(self) -> int:
        token = int(self.logits().argmax())
        self.feed([token])
        return token

    def logits(self) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))

    def about(self) -> dict[str, Any]:
        versions = {"llama-cpp-python": version("llama-cpp-python"), "system": self._system}
        return {"versions": versions, "cache": "float16"}


if __name__ == "__main__":
    protocol.run(build, Model)
