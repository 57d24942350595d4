"""``litert``: a ``.tflite`` for LiteRT, by litert-torch. Its interpreter runs it: ``trimkv-run --engine litert``.

One file with the signatures ``decode`` and ``prefill`` over common weights; float32. Tensors have the names of
:mod:`trimkv_edge.export.host_evicted`, with ``_`` for ``.``: ``past_0_key``, ``new_0_key``, ``gate_0``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.lowering import check_job, quiet, staged, zeros
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.onnx_gates import deferred_sigmoid
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

TARGET = "litert"
PROGRAM, CONSTANTS = "litert.tflite", "litert_host.json"


class _Named(nn.Module):
    """Names for what enters and leaves: signatures take theirs from keywords and from a dictionary."""

    def __init__(self, module: HostEvicted) -> None:
        super().__init__()
        self.module = module
        self.read, self.written = ([name.replace(".", "_") for name in names] for names in module.names())

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        hidden, cos, sin, mask, *past = (tensors[name] for name in self.read)
        return dict(zip(self.written, self.module(hidden, cos, sin, mask, past), strict=True))

    def inputs(self, config: CacheConfig, count: int) -> dict[str, Tensor | list[Tensor]]:
        *single, past = zeros(self.module, config, count)
        return dict(zip(self.read, [*single, *past], strict=True))


def export_litert(job: Job) -> Target:
    """Writes the program and what its host needs.

    Raises:
        ConfigError: a setting that a host does not run.
    """
    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = _Named(HostEvicted(filled(job.model, job.weights))).eval()
    counts = chunks(job.config)
    job.say(f"{TARGET}: converting for {' and '.join(map(tokens, counts.values()))}")
    with staged(job.folder) as scratch:
        with torch.no_grad(), deferred_sigmoid(module.module.model), quiet():
            _convert(module, job.config, counts).export(str(scratch / PROGRAM))
        files = save_host(module.module.model, job.weights, scratch, CONSTANTS)
    return Target(TARGET, job.ops, {"program": PROGRAM, **files})


def _convert(module: _Named, config: CacheConfig, counts: dict[str, int]) -> Any:
    import litert_torch

    signatures = litert_torch
    for name, count in counts.items():
        signatures = signatures.signature(name, module, (), module.inputs(config, count))
    return signatures.convert()
