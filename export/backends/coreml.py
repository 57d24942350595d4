"""``npu:coreml``: a ``.pte`` for ExecuTorch's CoreML backend, iOS 18 and macOS 15 on. Compiled only: CoreML is Apple's.

Methods ``decode`` and ``prefill`` take and give the tensors of :mod:`trimkv_edge.export.host_evicted` in its order, as
float32; inside, all is float16. Both are functions of one CoreML model that share their weights.

``fp16``: float16 weights. ``c4w``: linear layers in 4 bits with a scale for each output channel, which is what Apple's
Neural Engine takes; embedding, norms and gates as in ``fp16``. ``8a8w``: linear layers whose inputs and weights have 8
bits, the rest as in ``fp16``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from trimkv_edge.export.backends.coreml_package import GATE, Wanted, read_package
from trimkv_edge.export.backends.lowering import quiet, traced
from trimkv_edge.export.backends.one_program import Programs, export_program
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target

TARGET = "npu:coreml"


def export_coreml(job: Job) -> Target:
    """Writes the program, what its host needs, and ``coreml_report.json``: what the compiled model was found to be.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: CoreML does not take all of a graph, or the compiled model is not what was asked for.
    """

    def trace(module: HostEvicted, counts: dict[str, int]) -> Programs:
        if job.ops == "8a8w":
            from trimkv_edge.export.backends.calibration import tokens_for
            from trimkv_edge.export.backends.coreml_quantize import quantized

            return quantized(module, job.config, counts, tokens_for(job))
        if job.ops == "c4w":
            round_linears(module)
        return {name: traced(module, job.config, count) for name, count in counts.items()}

    def inspect(module: HostEvicted, counts: dict[str, int], program: bytes) -> dict[str, Any]:
        found = read_package(program)
        found.check(Wanted.stateless(module, job.config, counts, job.ops))
        return {"model": asdict(found)}

    return export_program(job, TARGET, partitioner, trace, inspect)


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
            lambda part, name: isinstance(part, nn.Linear) and GATE not in name,
        )


def partitioner() -> Any:
    """Takes what CoreML on iOS 18 computes in float16, on the CPU or the Neural Engine."""
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
