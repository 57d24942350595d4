"""``npu:ethos-u85``: a ``.pte`` for Arm's Ethos-U85 (256 MACs), by ExecuTorch's Arm backend and Vela. Compiled only.

The integer graphs are those of ``--target tosa`` in the same precision, which TOSA's reference model executes; what
Vela makes of them runs on the NPU, or on Arm's Fixed Virtual Platform, which no package index has.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.arm_program import Compiled, export_arm
from trimkv_edge.export.backends.lowering import save_program
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target

TARGET = "npu:ethos-u85"
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

    vela: dict[str, dict[str, float]] = {}

    def compiler() -> Any:
        return EthosUCompileSpec(_DEVICE, system_config=_SYSTEM, memory_mode=_MEMORY)

    def take(made: Compiled, file: Path) -> None:
        vela[made.name] = found = read_vela(made.dumped, made.said)
        if found["cpu_operators"]:
            raise VerificationError(f"Vela leaves {found['cpu_operators']} operators of {made.name} to the CPU")
        save_program(made.lowered, file)

    facts = {"device": _DEVICE, "system": _SYSTEM, "memory": _MEMORY, "vela": vela}
    return export_arm(job, TARGET, ".pte", compiler, EthosUQuantizer, EthosUPartitioner, take, facts)


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
