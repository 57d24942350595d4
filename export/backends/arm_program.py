"""What Arm's targets share: graphs in a precision, compiled in turn, with their borders and what their host needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
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


@dataclass(frozen=True)
class Compiled:
    """One graph after its compiler.

    Attributes:
        name: ``decode`` or ``prefill``; lowered: what came out.
        dumped: folder with the compiler's intermediate files; said: what it printed.
    """

    name: str
    lowered: Any
    dumped: Path
    said: str


def export_arm(
    job: Job,
    target: str,
    suffix: str,
    specification: Callable[[], Any],
    quantizer: Callable[[Any], Any],
    partitioner: Callable[[Any], Any],
    take: Callable[[Compiled, Path], None],
    facts: dict[str, Any],
) -> Target:
    """Writes a file for each number of tokens, their borders, what the host needs and ``NAME_report.json``.

    Args:
        target: NAME, with or without ``npu:``.
        suffix: of the files.
        specification: of the device, for Arm's compiler; ``quantizer`` and ``partitioner`` are made from one.
        take: puts what a graph became into its file; raises if that is not right.
        facts: for the report, read at the end.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the backend does not take all of a graph.
    """
    check_job(target, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts, name = chunks(job.config), target.removeprefix("npu:").replace("-", "_")
    if job.ops == "fp32":
        masked, programs = MASKED, {graph: traced(module, job.config, count) for graph, count in counts.items()}
    else:
        job.say(f"{target}: calibrating")
        masked = MASKED_IN_BITS
        programs = quantized(module, job.config, counts, job.ops, lambda: quantizer(specification()), tokens_for(job))
    files = {"borders": f"{name}_borders.json", "report": f"{name}_report.json"}
    graphs: dict[str, Any] = {}
    borders: dict[str, Border] = {}
    with staged(job.folder) as scratch:
        for graph, program in programs.items():
            job.say(f"{target}: compiling for {tokens(counts[graph])}")
            dumped, said, device = scratch / f".{graph}", StringIO(), specification()
            dumped.mkdir()
            device.dump_intermediate_artifacts_to(str(dumped))
            lowered = lower({graph: program}, {graph: partitioner(device)}, said)
            graphs |= whole(lowered, target, [graph])
            borders[graph] = border_of(lowered.exported_program(graph), module)
            files[graph] = f"{name}_{graph}{suffix}"
            take(Compiled(graph, lowered, dumped, said.getvalue()), scratch / files[graph])
            shutil.rmtree(dumped)
        files |= save_host(module.model, job.weights, scratch, f"{name}_host.json", masked)
        save_borders(borders, scratch / files["borders"])
        save_report(scratch / files["report"], {"graphs": graphs, **facts})
    return Target(target, job.ops, files)
