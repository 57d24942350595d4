"""What ExecuTorch's backends have in common: host-evicted graphs, lowered whole."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.onnx_gates import deferred_sigmoid
from trimkv_edge.host_eviction import require_host

# Nodes of a program that compute nothing: they pick a delegate's outputs, or round what enters and leaves it.
_BOUNDARY = ("getitem", "quantize_per_tensor", "dequantize_per_tensor")


@dataclass(frozen=True)
class Delegation:
    """How much of a graph its backend takes.

    Attributes:
        partitions: parts that the backend runs.
        nodes: compute nodes in them.
        left: compute nodes outside, by operator.
    """

    partitions: int
    nodes: int
    left: dict[str, int]

    def check_whole(self, graph: str) -> None:
        """Raises :class:`VerificationError` unless one part holds every compute node."""
        if self.partitions != 1 or self.left:
            outside = ", ".join(f"{count} {name}" for name, count in self.left.items()) or "none"
            raise VerificationError(
                f"{graph} was cut into {self.partitions} parts, compute nodes outside them: {outside}: report this "
                "with the model's name and settings"
            )


def check_job(target: str, config: CacheConfig, weight_bits: int) -> None:
    """Raises :class:`ConfigError` for what no backend here compiles."""
    if weight_bits < 32:
        raise ConfigError(f"--target {target} starts from float32 weights: use --quant none, and --precision")
    if config.kv_dtype != "float32":
        raise ConfigError(f"--target {target} chooses the type of keys and values itself: leave out --kv-dtype")
    require_host(config)


def zeros(module: HostEvicted, config: CacheConfig, count: int) -> tuple[Tensor | list[Tensor], ...]:
    """Arguments of a graph in memory of their own, which ExecuTorch insists on."""
    hidden, cos, sin, mask, past = module.inputs(config, count)
    return (*(torch.zeros(table.shape) for table in (hidden, cos, sin, mask)), [torch.zeros(t.shape) for t in past])


def traced(module: HostEvicted, config: CacheConfig, count: int) -> ExportedProgram:
    """A graph for ``count`` tokens; weights in memory."""
    with torch.no_grad(), deferred_sigmoid(module.model):
        return torch.export.export(module, zeros(module, config, count), strict=False)


def lower(programs: dict[str, ExportedProgram], partitioners: dict[str, Any], said: StringIO | None = None) -> Any:
    """Programs after their backend has taken what it takes, an ``EdgeProgramManager``.

    Args:
        programs: by method; partitioners: one for each method.
        said: takes what the compiler prints.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    with quiet(said):
        return to_edge_transform_and_lower(
            programs,
            partitioner={name: [taker] for name, taker in partitioners.items()},
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )


def delegation(lowered: Any, method: str) -> Delegation:
    """What the backend took of one method."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(lowered.exported_program(method).graph_module)
    left = {
        name: found.non_delegated
        for name, found in info.delegation_by_operator.items()
        if found.non_delegated and not any(part in name for part in _BOUNDARY)
    }
    return Delegation(info.num_delegated_subgraphs, info.num_delegated_nodes, left)


def whole(lowered: Any, target: str, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reports of all methods.

    Raises:
        VerificationError: a method is not one delegate with every compute node.
    """
    found = {}
    for method in methods:
        taken = delegation(lowered, method)
        taken.check_whole(f"{target}: the graph {method}")
        found[method] = asdict(taken)
    return found


def save_program(lowered: Any, path: Path) -> bytes:
    """Writes a ``.pte`` and returns it."""
    with quiet():
        data: bytes = lowered.to_executorch().buffer
    path.write_bytes(data)
    return data


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` when all is right."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder) as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)


@contextmanager
def quiet(said: StringIO | None = None) -> Iterator[None]:
    """Without progress bars, deprecations and versions that compilers talk about; ``said`` takes what they print."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(said or StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Writes what a compiler's output was found to be, as JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
