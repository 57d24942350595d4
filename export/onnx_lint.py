"""Static lint: may a runtime bind one buffer as ``past.X`` and ``present.X``?

Runtimes plan memory without knowing that the two are one buffer, so a graph has to be safe in every topological order.
The rules come from measurements with ONNX Runtime: a node between write and output copies the whole cache, and a read
that is not an ancestor of the write may see the new rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto
from onnx.inliner import inline_local_functions

PAST, PRESENT = "past.", "present."
# Operators whose kernels skip the copy when output and input are one buffer: {output index: input index}.
_IN_PLACE: dict[tuple[str, str], dict[int, int]] = {
    ("", "ScatterND"): {0: 0},
    ("", "ScatterElements"): {0: 0},
    ("", "TensorScatter"): {0: 0},
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
}
# Their outputs share the memory of input 0, so reading them is reading it.
_VIEWS = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_STANDARD_DOMAINS = {"", "ai.onnx"}


def lint(model: ModelProto, domains: Collection[str] | None = None) -> list[str]:
    """Hazards of in-place binding, and operators outside ``domains``; model-local functions are inlined first.

    Args:
        model: state tensors are inputs ``past.X`` and outputs ``present.X``.
        domains: allowed operator domains (``""`` is ONNX's own); None allows all.

    Returns:
        readable findings, one line each; empty if the graph is safe.
    """
    graph = inline_local_functions(model).graph
    findings = [
        f"operator {node.domain}::{node.op_type} is outside the allowed domains"
        for node in _all_nodes(graph)
        if domains is not None and node.domain not in domains
    ]
    past = {value.name: value for value in graph.input if value.name.startswith(PAST)}
    present = {value.name: value for value in graph.output if value.name.startswith(PRESENT)}
    for name in past:
        if PRESENT + name[len(PAST) :] not in present:
            findings.append(f"input {name} has no output {PRESENT + name[len(PAST) :]}")
    lines = _Lines(graph)
    for name, value in present.items():
        source = PAST + name[len(PRESENT) :]
        if source not in past:
            findings.append(f"output {name} has no input {source}")
        elif past[source].type != value.type:
            findings.append(f"{source} and {name} differ in type or shape")
        else:
            findings.extend(lines.check(source, name))
    return findings


def lint_standard(model: ModelProto) -> list[str]:
    """:func:`lint`, allowing only operators of the ONNX domain."""
    return lint(model, _STANDARD_DOMAINS)


class _Lines:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = list(graph.node)
        self.maker = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in set(_reads(node)):
                self.readers.setdefault(name, []).append(index)

    def check(self, past: str, present: str) -> Iterator[str]:
        """Findings of one state tensor."""
        index = self.maker.get(present)
        if index is None:
            yield f"{present} is not written by any node"
            return
        writer = self.nodes[index]
        slots = _IN_PLACE.get((writer.domain, writer.op_type))
        output = list(writer.output).index(present)
        if writer.op_type == "If" and writer.domain in _STANDARD_DOMAINS:
            # A branch gets the buffer that its outcome is bound to.
            for inner in _subgraphs(writer):
                yield from _Lines(inner).check(past, inner.output[output].name)
        elif slots is None or output not in slots:
            yield f"{present} is made by {_describe(writer)}, which cannot write in place: all of it is copied"
            return
        elif (target := writer.input[slots[output]]) != past:
            yield f"{present} is made by {_describe(writer)} from {target!r} instead of {past}: all of it is copied"
        ancestors = self._ancestors(index)
        for reader in self._readers_of(past):
            if reader not in ancestors:
                yield (
                    f"{_describe(self.nodes[reader])} reads {past}, but does not come before its writer "
                    f"{_describe(writer)} in every order"
                )

    def _readers_of(self, name: str) -> Iterator[int]:
        for index in self.readers.get(name, []):
            yield index
            node = self.nodes[index]
            if node.domain in _STANDARD_DOMAINS and node.op_type in _VIEWS and node.input[0] == name:
                yield from self._readers_of(node.output[0])

    def _ancestors(self, index: int) -> set[int]:
        found, waiting = {index}, [index]
        while waiting:
            for name in _reads(self.nodes[waiting.pop()]):
                before = self.maker.get(name)
                if before is not None and before not in found:
                    found.add(before)
                    waiting.append(before)
        return found


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _all_nodes(inner)


def _reads(node: NodeProto) -> Iterator[str]:
    """Values that a node reads, also from inside its subgraphs."""
    yield from (name for name in node.input if name)
    for inner in _subgraphs(node):
        for child in _all_nodes(inner):
            yield from (name for name in child.input if name)


def _describe(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"
