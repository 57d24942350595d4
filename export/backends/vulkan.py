"""``vulkan``: a ``.pte`` for ExecuTorch's Vulkan backend, for the GPUs of phones. Compiled only.

The runtime that pip installs lacks this backend; an app builds it in. Methods ``decode`` and ``prefill``; tensors as in
:mod:`trimkv_edge.export.host_evicted`, in its order. ``fp16`` computes in float16.
"""

from __future__ import annotations

from typing import Any

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

TARGET = "vulkan"
PROGRAM, CONSTANTS, REPORT = "vulkan.pte", "vulkan_host.json", "vulkan_report.json"


def export_vulkan(job: Job) -> Target:
    """Writes the program, what its host needs, and ``vulkan_report.json``.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the backend does not take all of a graph.
    """
    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts = chunks(job.config)
    job.say(f"{TARGET}: compiling for {' and '.join(map(tokens, counts.values()))}")
    with staged(job.folder) as scratch:
        lowered = lower(
            {name: traced(module, job.config, count) for name, count in counts.items()},
            {name: _partitioner(job.ops) for name in counts},
        )
        graphs = whole(lowered, TARGET, list(counts))
        save_program(lowered, scratch / PROGRAM)
        files = save_host(module.model, job.weights, scratch, CONSTANTS)
        save_report(scratch / REPORT, {"graphs": graphs})
    return Target(TARGET, job.ops, {"program": PROGRAM, "report": REPORT, **files})


def _partitioner(precision: str) -> Any:
    with quiet():
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"force_fp16": precision == "fp16"})
