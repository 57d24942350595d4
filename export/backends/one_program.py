"""What targets share that are one ``.pte`` with a method for each number of tokens, lowered whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.export import ExportedProgram

from trimkv_edge.export.backends.lowering import check_job, lower, save_program, save_report, staged, traced, whole
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

Programs = dict[str, ExportedProgram]


def export_program(
    job: Job,
    target: str,
    partitioner: Callable[[], Any],
    trace: Callable[[HostEvicted, dict[str, int]], Programs] | None = None,
    inspect: Callable[[HostEvicted, dict[str, int], bytes], dict[str, Any]] = lambda module, counts, program: {},
) -> Target:
    """Writes ``NAME.pte``, what its host needs, and ``NAME_report.json``: what the backend took.

    Args:
        target: NAME, with or without ``npu:``.
        partitioner: makes one of the backend.
        trace: ``(module, tokens by method)`` -> graphs; default: as they are, in float32.
        inspect: ``(module, tokens by method, program)`` -> more for the report; raises if the program is not right.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the backend does not take all of a graph.
    """
    check_job(target, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts, name = chunks(job.config), target.removeprefix("npu:")
    program, report = f"{name}.pte", f"{name}_report.json"
    job.say(f"{target}: compiling for {' and '.join(map(tokens, counts.values()))}")
    with staged(job.folder) as scratch:
        files = save_host(module.model, job.weights, scratch, f"{name}_host.json")  # before weights are rounded
        programs = (
            trace(module, counts)
            if trace
            else {method: traced(module, job.config, count) for method, count in counts.items()}
        )
        lowered = lower(programs, {method: partitioner() for method in counts})
        graphs = whole(lowered, target, list(counts))
        made = save_program(lowered, scratch / program)
        save_report(scratch / report, {"graphs": graphs, **inspect(module, counts, made)})
    return Target(target, job.ops, {"program": program, "report": report, **files})
