"""``npu:coreml``: a ``.pte`` for ExecuTorch's CoreML backend, iOS 18 and macOS 15 on. Compiled only: CoreML is Apple's.

Methods ``decode`` and ``prefill`` take and give the tensors of :mod:`trimkv_edge.export.host_evicted` in its order, as
float32; inside, all is float16. Both are functions of one CoreML model that share their weights.

``fp16``: float16 weights. ``c4w``: linear layers in 4 bits with a scale for each output channel, which is what Apple's
Neural Engine takes; embedding, norms and gates as in ``fp16``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from trimkv_edge.export.backends.coreml_package import read_package
from trimkv_edge.export.backends.lowering import (
    check_job,
    chunks,
    lower,
    quiet,
    save_host,
    save_program,
    save_report,
    staged,
    tokens,
    traced,
    whole,
)
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

TARGET = "npu:coreml"
PROGRAM, CONSTANTS, REPORT = "coreml.pte", "coreml_host.json", "coreml_report.json"


def export_coreml(job: Job) -> Target:
    """Writes the program, what its host needs, and ``coreml_report.json``: what the compiled model was found to be.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: CoreML does not take all of a graph, or the compiled model is not what was asked for.
    """
    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts = chunks(job.config)
    job.say(f"{TARGET}: compiling for {' and '.join(map(tokens, counts.values()))}")
    with staged(job.folder) as scratch:
        files = save_host(module.model, job.weights, scratch, CONSTANTS)
        if job.ops == "c4w":
            round_linears(module)
        lowered = lower(
            {name: traced(module, job.config, count) for name, count in counts.items()},
            {name: _partitioner() for name in counts},
        )
        graphs = whole(lowered, TARGET, list(counts))
        found = read_package(save_program(lowered, scratch / PROGRAM))
        found.check(module, job.config, counts)
        save_report(scratch / REPORT, {"graphs": graphs, "model": asdict(found)})
    return Target(TARGET, job.ops, {"program": PROGRAM, "report": REPORT, **files})


def round_linears(module: HostEvicted) -> None:
    """Linear layers in 4 bits for each output channel; gates stay, since rankings follow from them."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    with quiet():
        quantize_(
            module,
            IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                granularity=PerAxis(0),
            ),
            lambda part, name: isinstance(part, nn.Linear) and "retention_gate" not in name,
        )


def _partitioner() -> Any:
    with quiet():
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        return CoreMLPartitioner(
            compile_specs=CoreMLBackend.generate_compile_specs(
                minimum_deployment_target=coremltools.target.iOS18,
                compute_precision=coremltools.precision.FLOAT16,
                compute_unit=coremltools.ComputeUnit.CPU_AND_NE,
            )
        )
