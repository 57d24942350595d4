"""Where an engine's time goes, by operator."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trimkv_edge.errors import TrimKVError

_KERNEL = "_kernel_time"
_NATIVE = "native_call_"
UNNAMED = "(llama operators: attention, cache)"


class OperatorTime(NamedTuple):
    """``seconds`` in all ``calls`` of one kind of operator."""

    operator: str
    calls: int
    seconds: float


def read_onnxruntime(*paths: Path) -> list[OperatorTime]:
    """Operators of onnxruntime profiles, the slowest first.

    Raises:
        TrimKVError: a file is not one.
    """
    found = []
    for path in paths:
        try:
            found += [
                (event["args"]["op_name"], event["dur"] * 1e-6)
                for event in json.loads(path.read_text(encoding="utf-8"))
                if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrimKVError(f"{path} is not an onnxruntime profile ({error})") from error
    return total(found)


def read_etdump(path: Path) -> list[OperatorTime]:
    """Operators of ExecuTorch's event dump, delegated ones by the delegate's own names, the slowest first.

    Raises:
        TrimKVError: executorch's developer tools cannot be imported.
    """
    try:
        from executorch.devtools import Inspector
    except ImportError as error:
        raise TrimKVError(
            f"profiles of the executorch engine need its developer tools ({error}): pip install 'trimkv-edge[export]'"
        ) from error
    found = []
    for block in Inspector(etdump_path=str(path)).event_blocks:
        before = ""
        for event in block.events:
            name = event.name.removeprefix(_NATIVE).split(" #")[0]
            # A kernel that does not name itself leaves only the call around it.
            unnamed = event.name == "OPERATOR_CALL" and not before.startswith(_NATIVE)
            if event.perf_data and (event.is_delegated_op or event.name.startswith(_NATIVE) or unnamed):
                name = UNNAMED if unnamed else name
                found += [(name, milliseconds / 1000) for milliseconds in event.perf_data.raw]
            before = event.name
    return total(found)


def total(calls: Sequence[tuple[str, float]]) -> list[OperatorTime]:
    """Calls ``(operator, seconds)`` added up by operator, the slowest first."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for operator, spent in calls:
        seconds[operator].append(spent)
    rows = [OperatorTime(operator, len(spent), sum(spent)) for operator, spent in seconds.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def lines(rows: Sequence[OperatorTime]) -> list[str]:
    """A table for people."""
    everything = sum(row.seconds for row in rows) or 1.0
    return [
        f"{'operator':<32} {'calls':>8} {'ms':>10} {'share':>7}",
        *(
            f"{row.operator:<32} {row.calls:>8} {row.seconds * 1000:>10.1f} {100 * row.seconds / everything:>6.1f}%"
            for row in rows
        ),
    ]
