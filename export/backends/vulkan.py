"""``vulkan``: a ``.pte`` for ExecuTorch's Vulkan backend, for the GPUs of phones. Compiled only.

The runtime that pip installs lacks this backend; an app builds it in. Methods ``decode`` and ``prefill``; tensors as in
:mod:`trimkv_edge.export.host_evicted`, in its order. ``fp16`` computes in float16.
"""

from __future__ import annotations

from typing import Any

from trimkv_edge.export.backends.lowering import quiet
from trimkv_edge.export.backends.one_program import export_program
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target


def export_vulkan(job: Job) -> Target:
    """See :func:`~trimkv_edge.export.backends.one_program.export_program`."""
    return export_program(job, "vulkan", lambda: _partitioner(job.ops))


def _partitioner(precision: str) -> Any:
    with quiet():
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"force_fp16": precision == "fp16"})
