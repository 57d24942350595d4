"""What a compiled CoreML model is, read from the ``.pte`` that holds it: nothing here runs it, but all can be seen."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.backends.lowering import quiet
from trimkv_edge.export.host_evicted import HostEvicted

# MIL operators that the supported families come down to; Apple's Neural Engine has no gather, scatter or argmin.
_NAMES = """
    add cast concat const constexpr_blockwise_shift_scale expand_dims gelu identity linear matmul mul pow real_div
    reduce_mean reshape rsqrt sigmoid silu slice_by_index softmax split squeeze sub tanh transpose
"""
OPERATORS = frozenset(_NAMES.split())
_IOS18 = 9  # specificationVersion


@dataclass(frozen=True)
class CoreMLFunction:
    """One graph. Sizes by tensor, operators by how often they stand in it, states by name."""

    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    types: list[str]
    operators: dict[str, int]
    states: list[str]


@dataclass(frozen=True)
class CoreMLModel:
    """What a package holds. ``weights``: bytes of the file with the constants, which all functions share."""

    version: int
    weights: int
    functions: dict[str, CoreMLFunction]

    def check(self, module: HostEvicted, config: CacheConfig, counts: dict[str, int]) -> None:
        """Raises :class:`VerificationError` if this is not the model that was asked for.

        Checked: iOS 18; a function for each count; sizes of inputs and outputs; float32 or float16 at the border; no
        states; operators of :data:`OPERATORS`.
        """
        faults = [] if self.version == _IOS18 else [f"specification version {self.version}, not {_IOS18}"]
        if set(self.functions) != set(counts):
            faults.append(f"functions {', '.join(self.functions)}, not {', '.join(counts)}")
        for name in set(counts) & set(self.functions):
            found = self.functions[name]
            hidden, cos, sin, mask, past = module.inputs(config, counts[name])
            wanted = sorted(list(table.shape) for table in (hidden, cos, sin, mask, *past))
            if sorted(found.inputs.values()) != wanted:
                faults.append(f"{name} has inputs {found.inputs}")
            if len(found.outputs) != len(module.names()[1]):
                faults.append(f"{name} has {len(found.outputs)} outputs")
            if odd := set(found.types) - {"FLOAT32", "FLOAT16"}:
                faults.append(f"{name} has {', '.join(sorted(odd))} at its border")
            if found.states:
                faults.append(f"{name} has states {', '.join(found.states)}")
            if odd := set(found.operators) - OPERATORS:
                faults.append(f"{name} has operators {', '.join(sorted(odd))}, which the Neural Engine may not take")
        if faults:
            raise VerificationError(f"the CoreML model is not what was asked for: {'; '.join(faults)}: report this")


def read_package(program: bytes) -> CoreMLModel:
    """Reads the CoreML model of a ``.pte`` whose methods are one delegate each.

    Raises:
        VerificationError: there is none, or more than one.
    """
    with quiet():
        import coremltools
        from executorch.backends.apple.coreml import executorchcoreml
    with tempfile.TemporaryDirectory() as scratch:
        executorchcoreml.unflatten_directory_contents(_blob(program), scratch)
        (model,) = Path(scratch).rglob("*.mlmodel")
        weights = sum(path.stat().st_size for path in Path(scratch).rglob("weight.bin"))
        spec = coremltools.utils.load_spec(str(model))
    described = {entry.name: entry for entry in spec.description.functions} or {"main": spec.description}
    names = {"main": "decode"}  # a single method keeps CoreML's own name
    return CoreMLModel(
        spec.specificationVersion,
        weights,
        {
            names.get(name, name): _function(body, described[name])
            for name, body in sorted(spec.mlProgram.functions.items())
        },
    )


def _blob(program: bytes) -> bytes:
    """The one package: of several methods it is named data that they share, of one method the delegate's own."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(program)
    shared = list(file.named_data.buffers) if file.named_data else []
    blobs = shared or [bytes(delegate.data) for delegate in file.program.backend_delegate_data]
    if len(blobs) != 1:
        raise VerificationError(f"the program holds {len(blobs)} CoreML models, not one: report this")
    return blobs[0]


def _function(body: Any, described: Any) -> CoreMLFunction:
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

    operators = Counter(op.type for block in body.block_specializations.values() for op in block.operations)
    border = [*described.input, *described.output]
    return CoreMLFunction(
        {entry.name: list(entry.type.multiArrayType.shape) for entry in described.input},
        {entry.name: list(entry.type.multiArrayType.shape) for entry in described.output},
        sorted({ArrayFeatureType.ArrayDataType.Name(entry.type.multiArrayType.dataType) for entry in border}),
        dict(sorted(operators.items())),
        [entry.name for entry in described.state],
    )
