"""``npu:ethos-u85``: a ``.pte`` for Arm's Ethos-U85 (256 MACs), by ExecuTorch's Arm backend and Vela. Compiled only.

The integer graphs are those of ``--target tosa`` in the same precision, which TOSA's reference model executes; what
Vela makes of them runs on the NPU, or on Arm's Fixed Virtual Platform, which no package index has.
"""

from __future__ import annotations

import csv
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.arm_border import border_of
from trimkv_edge.export.backends.arm_quantize import quantized
from trimkv_edge.export.backends.calibration import MASKED_IN_BITS, tokens_for
from trimkv_edge.export.backends.lowering import check_job, lower, save_program, save_report, staged, whole
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.targets import Job
from trimkv_edge.host_border import Border, save_borders
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

TARGET = "npu:ethos-u85"
BORDERS, CONSTANTS, REPORT = "ethos_u85_borders.json", "ethos_u85_host.json", "ethos_u85_report.json"
_DEVICE = "ethos-u85-256"
_SYSTEM, _MEMORY = "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"
_OPERATORS = re.compile(r"^(CPU|NPU) operators = (\d+)", re.MULTILINE)


def export_ethos_u85(job: Job) -> Target:
    """Writes a program for each number of tokens, their borders, what the host needs, and Vela's report.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the backend does not take all of a graph, or Vela leaves an operator to the CPU.
    """
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
    from executorch.backends.arm.quantizer import EthosUQuantizer

    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts = chunks(job.config)

    def compiler() -> Any:
        return EthosUCompileSpec(_DEVICE, system_config=_SYSTEM, memory_mode=_MEMORY)

    job.say(f"{TARGET}: calibrating")
    programs = quantized(module, job.config, counts, job.ops, lambda: EthosUQuantizer(compiler()), tokens_for(job))
    files = {"borders": BORDERS, "report": REPORT}
    graphs: dict[str, Any] = {}
    borders: dict[str, Border] = {}
    vela: dict[str, dict[str, float]] = {}
    with staged(job.folder) as scratch:
        for name, program in programs.items():
            job.say(f"{TARGET}: compiling for {tokens(counts[name])}")
            dumped, said, spec = scratch / f".{name}", StringIO(), compiler()
            dumped.mkdir()
            spec.dump_intermediate_artifacts_to(str(dumped))
            lowered = lower({name: program}, {name: EthosUPartitioner(spec)}, said)
            graphs |= whole(lowered, TARGET, [name])
            vela[name] = read_vela(dumped, said.getvalue())
            shutil.rmtree(dumped)
            if vela[name]["cpu_operators"]:
                raise VerificationError(f"Vela leaves {vela[name]['cpu_operators']} operators of {name} to the CPU")
            borders[name] = border_of(lowered.exported_program(name), module)
            files[name] = f"ethos_u85_{name}.pte"
            save_program(lowered, scratch / files[name])
        files |= save_host(module.model, job.weights, scratch, CONSTANTS, MASKED_IN_BITS)
        save_borders(borders, scratch / BORDERS)
        save_report(
            scratch / REPORT, {"device": _DEVICE, "system": _SYSTEM, "memory": _MEMORY, "graphs": graphs, "vela": vela}
        )
    return Target(TARGET, job.ops, files)


def read_vela(folder: Path, said: str) -> dict[str, float]:
    """Vela's own estimates: operators on NPU and CPU, KiB of each memory, cycles and inferences per second.

    Args:
        folder: where it wrote its files; said: what it printed.

    Raises:
        VerificationError: it did not say so.
    """
    counted = {f"{kind.lower()}_operators": float(count) for kind, count in _OPERATORS.findall(said)}
    summaries = list(folder.rglob("*summary*.csv"))
    if set(counted) != {"cpu_operators", "npu_operators"} or len(summaries) != 1:
        raise VerificationError("Vela gave no report: use ethos-u-vela 5.1.0")
    with summaries[0].open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    wanted = ("sram_memory_used", "dram_memory_used", "cycles_total", "inferences_per_second")
    return counted | {key: float(row[key]) for key in wanted if key in row}
