"""What fits into memory: how long a context a peer can have, and which peers can be held at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from registry import Peer
from shapes import Shape

_RUNTIME = 600 * 2**20  # an interpreter with a runtime in it, and its workspace
_WEIGHT_COPIES = 1.3  # some runtimes repack weights beside the mapped file
STEPS = 512  # room for what is decoded after a context was read


class Need(NamedTuple):
    """Bytes that a worker takes: always, and for each token of the longest context."""

    fixed: int
    per_token: int

    def at(self, context: int) -> int:
        return self.fixed + self.per_token * (context + STEPS)


def need(peer: Peer, shape: Shape, file_bytes: int, quant: str) -> Need:
    """An estimate on the safe side."""
    elements = {"float32": 4, "bfloat16": 2}.get(peer.label(quant))
    weights = file_bytes if elements is None else max(file_bytes, shape.parameters * elements)
    fixed = int(_WEIGHT_COPIES * weights) + _RUNTIME
    if peer.element:
        return Need(fixed, shape.key_value_bytes(peer.element))
    entries = int(peer.options["budget"]) + int(peer.options["buffer"])
    return Need(fixed + shape.key_value_bytes(4) * entries, 0)


def not_quantised(file_bytes: int, shape: Shape, quant: str) -> str:
    """What is wrong with a build that is too large for its scheme; empty if nothing is.

    A parameter may take as much as a 4-bit one beside a float32 embedding, or an 8-bit one with its scales.
    """
    most = {"none": 5.0, "int8": 2.2, "int4": 1.6}[quant] * shape.parameters
    if file_bytes <= most:
        return ""
    return f"its build has {file_bytes / shape.parameters:.1f} bytes per parameter, so it is not {quant}: use --rebuild"


def fitting(needed: Need, contexts: Sequence[int], available: int) -> list[int]:
    """The contexts that fit; all shorter ones fit with a longer one."""
    return [context for context in contexts if needed.at(context) <= available]


def groups(bytes_of: Mapping[str, int], reference: str, available: int) -> list[list[str]]:
    """Peers that are measured side by side: all, or each with the reference where all do not fit.

    A peer that does not even fit beside the reference gets a group of its own, without a ratio.
    """
    if sum(bytes_of.values()) <= available:
        return [list(bytes_of)] if bytes_of else []
    others = [name for name in bytes_of if name != reference]
    if reference not in bytes_of:
        return [[name] for name in others]
    beside = available - bytes_of[reference]
    return [[reference, name] if bytes_of[name] <= beside else [name] for name in others] or [[reference]]
