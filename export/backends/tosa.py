"""``tosa``: TOSA 1.0 graphs, Arm's standard for what NPUs compute, by ExecuTorch's Arm backend.

Arm's reference model of the standard executes them: ``trimkv-run --engine tosa`` (slow: it is made to be right).
``fp32``: float32. Others are integers throughout, calibrated on a stream that evicts; which have how many bits:
:mod:`~trimkv_edge.export.backends.arm_recipes`.
"""

from __future__ import annotations

from typing import Any

from trimkv_edge.export.backends.arm_border import border_of
from trimkv_edge.export.backends.arm_quantize import quantized
from trimkv_edge.export.backends.calibration import MASKED_IN_BITS, tokens_for
from trimkv_edge.export.backends.lowering import check_job, lower, save_report, staged, traced, whole
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.targets import Job
from trimkv_edge.host_border import Border, save_borders
from trimkv_edge.host_cache import MASKED
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

TARGET = "tosa"
BORDERS, CONSTANTS, REPORT = "tosa_borders.json", "tosa_host.json", "tosa_report.json"
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

    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    files = {"borders": BORDERS, "report": REPORT}
    counts = chunks(job.config)
    spec = TosaCompileSpec(_PROFILES[job.ops])
    if job.ops == "fp32":
        programs = {name: traced(module, job.config, count) for name, count in counts.items()}
    else:
        job.say(f"{TARGET}: calibrating")
        programs = quantized(module, job.config, counts, job.ops, lambda: TOSAQuantizer(spec), tokens_for(job))
    graphs: dict[str, Any] = {}
    borders: dict[str, Border] = {}
    with staged(job.folder) as scratch:
        for name, program in programs.items():
            job.say(f"{TARGET}: compiling for {tokens(counts[name])}")
            dumped = scratch / f".{name}"
            dumped.mkdir()
            spec = TosaCompileSpec(_PROFILES[job.ops])
            spec.dump_intermediate_artifacts_to(str(dumped))
            lowered = lower({name: program}, {name: TOSAPartitioner(spec)})
            graphs |= whole(lowered, TARGET, [name])
            borders[name] = border_of(lowered.exported_program(name), module)
            files[name] = f"tosa_{name}.tosa"
            (graph,) = dumped.glob("*.tosa")
            graph.replace(scratch / files[name])
            dumped.rmdir()
        files |= save_host(
            module.model, job.weights, scratch, CONSTANTS, MASKED if job.ops == "fp32" else MASKED_IN_BITS
        )
        save_borders(borders, scratch / BORDERS)
        save_report(scratch / REPORT, {"graphs": graphs})
    return Target(TARGET, job.ops, files)
