"""What a finished ExecuTorch program must look like; checked at every export, since a wrong plan gives no error."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch.fx import Node

from trimkv_edge.errors import VerificationError

# Arena of the shared mutable buffers in ExecuTorch's plan; activations are in arena 1.
STATE_ARENA = 2
# Part of every runtime, not of a kernel library.
_BUILTIN = ("executorch_prim::", "aten::sym_size", "aten::_local_scalar_dense")


def operators(program: Any) -> dict[str, Counter[str]]:
    """Operators of each method of an ``ExecutorchProgramManager``, as a runtime looks them up (``aten::add.out``)."""
    found: dict[str, Counter[str]] = {}
    for plan in program.executorch_program.execution_plan:
        names = [f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators]
        calls = (call.instr_args for chain in plan.chains for call in chain.instructions)
        counts = Counter(names[args.op_index] for args in calls if hasattr(args, "op_index"))
        counts["delegate"] = len(plan.delegates)
        found[plan.name] = counts
    return found


def check_program(program: Any, ops: str) -> None:
    """Raises :class:`VerificationError` if a program would compute wrongly, copy the cache, or miss kernels."""
    by_method = operators(program)
    faults = []
    if ops == "portable":
        known = portable_kernels()
        for method, counts in by_method.items():
            faults += [
                f"{method} needs {name}, which is no portable kernel"
                for name, count in counts.items()
                if count and name not in known and not name.startswith(_BUILTIN)
            ]
    else:
        for method in sorted(by_method.keys() & {"forward", "gates"}):
            faults += [
                f"{method} calls {name}"
                for name in by_method[method]
                if name.startswith(("aten::copy_", "aten::index_put", "aten::copy"))
            ]
            for node in program.exported_program(method).graph_module.graph.nodes:
                faults += _misplaced(node) + _copied(node)
    if faults:
        raise VerificationError(
            f"the executorch program is not right: {'; '.join(faults)}: report this with the model's name and settings"
        )


def portable_kernels() -> frozenset[str]:
    """Operators of ExecuTorch's portable kernel library, from its own list."""
    text = (files("executorch.kernels.portable") / "functions.yaml").read_text(encoding="utf-8")
    return frozenset(f"aten::{row['op']}" for row in yaml.safe_load(text) if "op" in row)


def _misplaced(node: Node) -> list[str]:
    """Attention must read the buffers' own memory: a copy there is slow, or planned and never written."""
    if "custom_sdpa" not in str(node.target):
        return []
    places = [arg.meta["spec"].mem_id for arg in node.args[1:3] if isinstance(arg, Node)]
    return [] if places == [STATE_ARENA] * 2 else [f"{node.name} reads the cache from arenas {places}"]


def _copied(node: Node) -> list[str]:
    """Only the cache's own operators read its tables, or views that lie in the same memory."""
    if node.op != "call_function" or str(node.target).startswith("llama.") or _arena(node) == STATE_ARENA:
        return []
    inputs = [arg for arg in node.all_input_nodes if _arena(arg) == STATE_ARENA]
    return [f"{node.name} copies {arg.name}" for arg in inputs if arg.meta["spec"].dtype == torch.float32]


def _arena(node: Node) -> int | None:
    return getattr(node.meta.get("spec"), "mem_id", None)
