"""trimkv-edge: an artefact of the same weights with random gates. Options: engine, budget, buffer, kv_dtype, verify."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import protocol


def build(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    """``trimkv-export`` as a user calls it; with ``verify=no`` without comparing the artefact with the eager model."""
    if options.get("verify") == "no":
        _build_unverified(weights, output, quant, options)
        return
    command = [sys.executable, "-m", "trimkv_edge.cli.export", "--model", str(weights)]
    command += ["--gates", str(weights / "gates.safetensors"), "--target", options["engine"]]
    command += ["--budget", options["budget"], "--buffer", options["buffer"], "--kv-dtype", options["kv_dtype"]]
    if quant != "none":
        command += ["--quant", quant]
    # Elsewhere the repository's folders would hide the installed package.
    subprocess.run([*command, "--force", "-o", str(output.resolve())], check=True, cwd=output.parent)


def _build_unverified(weights: Path, output: Path, quant: str, options: dict[str, str]) -> None:
    from trimkv_edge.export import pipeline

    request = pipeline.ExportRequest(
        model=str(weights),
        output=output,
        budget=options["budget"],
        buffer=int(options["buffer"]),
        targets=(options["engine"],),
        gates=str(weights / "gates.safetensors"),
        quant=quant,
        kv_dtype=options["kv_dtype"],
        force=True,
    )
    with patch.object(pipeline, "verify_targets", lambda manifest, *_: manifest):
        pipeline.run_export(pipeline.plan_export(request), print)


class Model(protocol.Model):
    def __init__(self, folder: Path, threads: int, length: int, options: dict[str, str]) -> None:
        super().__init__()
        from trimkv_edge.runtime.artefact import Artefact
        from trimkv_edge.runtime.engines import load_engine

        artefact = Artefact.load(folder, verify=False)
        self.manifest = artefact.manifest
        self.engine = load_engine(artefact, options["engine"], threads)
        self.vocabulary = self.engine.vocab_size
        self.steps_per_event = self.engine.config.buffer
        self._logits = np.zeros(self.vocabulary, np.float32)

    def reset(self) -> None:
        self.engine.reset()

    def feed(self, tokens: list[int]) -> None:
        pending = tokens
        while pending:
            size = min(self.engine.room, self.engine.config.prefill_chunk, len(pending))
            self._logits = self.engine.prefill(pending[:size])
            pending = pending[size:]
            if self.engine.room == 0:
                self._evict()

    def step(self) -> int:
        token = int(self._logits.argmax())
        self._logits = self.engine.decode(token)
        if self.engine.room == 0:
            self._evict()
        return token

    def _evict(self) -> None:
        started = time.perf_counter()
        self.engine.evict()
        self.event_seconds.append(time.perf_counter() - started)

    def logits(self) -> np.ndarray:
        return self._logits

    def about(self) -> dict[str, Any]:
        cache = self.manifest.cache
        return {
            "versions": self.manifest.tools,
            "cache": cache.kv_dtype,
            "policy": f"{cache.policy}, {cache.budget} + {cache.buffer} entries per head",
            "cache_bytes": self.manifest.bytes.cache,
        }


if __name__ == "__main__":
    protocol.run(build, Model)
