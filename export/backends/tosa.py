"""``tosa``: TOSA 1.0 graphs, Arm's standard for what NPUs compute, by ExecuTorch's Arm backend.

Arm's reference model of the standard executes them: ``trimkv-run --engine tosa`` (slow: it is made to be right).
``fp32``: float32. Others are integers throughout, calibrated on a stream that evicts; which have how many bits:
:mod:`~trimkv_edge.export.backends.arm_recipes`.
"""

from __future__ import annotations

from pathlib import Path

from trimkv_edge.export.backends.arm_program import Compiled, export_arm
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target

TARGET = "tosa"
_PROFILES = {
    "fp32": "TOSA-1.0+FP",
    "int8": "TOSA-1.0+INT+int16",
    "a8w4": "TOSA-1.0+INT+int16+int4",
    "a16w8": "TOSA-1.0+INT+int16",
}


def export_tosa(job: Job) -> Target:
    """Writes a graph for each number of tokens, their borders, what the host needs and ``tosa_report.json``.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the backend does not take all of a graph.
    """
    from executorch.backends.arm.quantizer import TOSAQuantizer
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    def take(made: Compiled, file: Path) -> None:
        (graph,) = made.dumped.glob("*.tosa")
        graph.replace(file)

    profile = _PROFILES[job.ops]
    return export_arm(job, TARGET, ".tosa", lambda: TosaCompileSpec(profile), TOSAQuantizer, TOSAPartitioner, take, {})
