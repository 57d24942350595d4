"""What a compiled CoreML model is, read from the ``.pte`` that holds it: nothing here runs it, but all can be seen."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

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
_QUANTIZING = frozenset(["quantize", "dequantize"])
_WRITING = frozenset(["read_state", "write_state", "slice_update", "reduce_sum"])
# Type of the rounded weights of linear layers, by precision.
_ROUNDED = {"fp16": "", "c4w": "INT4", "8a8w": "INT8"}
_CONSTANT = "constexpr_blockwise_shift_scale"
GATE = "retention_gate"  # in names of weights that are never rounded: rankings follow from them
_IOS18 = 9  # specificationVersion


@dataclass(frozen=True)
class CoreMLFunction:
    """One graph. Sizes by tensor, operators by how often they stand in it.

    Attributes:
        types: of inputs and outputs.
        states: sizes by name; all are float16.
        rounded: rounded weights by their type.
    """

    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    types: list[str]
    operators: dict[str, int]
    states: dict[str, list[int]]
    rounded: dict[str, int]


@dataclass(frozen=True)
class CoreMLModel:
    """What a package holds. ``weights``: bytes of the file with the constants, which all functions share."""

    version: int
    weights: int
    functions: dict[str, CoreMLFunction]

    def check(self, wanted: Wanted) -> None:
        """Raises :class:`VerificationError` if this is not the model that was asked for, on iOS 18."""
        faults = [] if self.version == _IOS18 else [f"specification version {self.version}, not {_IOS18}"]
        if set(self.functions) != set(wanted.inputs):
            faults.append(f"functions {', '.join(self.functions)}, not {', '.join(wanted.inputs)}")
        for name in set(wanted.inputs) & set(self.functions):
            found = self.functions[name]
            if sorted(found.inputs.values()) != wanted.inputs[name]:
                faults.append(f"{name} has inputs {found.inputs}")
            if len(found.outputs) != wanted.outputs:
                faults.append(f"{name} has {len(found.outputs)} outputs")
            if odd := set(found.types) - wanted.types:
                faults.append(f"{name} has {', '.join(sorted(odd))} at its border")
            if found.states != wanted.states:
                faults.append(f"{name} has states {found.states}")
            if found.rounded != wanted.rounded:
                faults.append(f"{name} has rounded weights {found.rounded}, not {wanted.rounded}")
            if odd := set(found.operators) - wanted.operators:
                faults.append(f"{name} has operators {', '.join(sorted(odd))}, which the Neural Engine may not take")
        if faults:
            raise VerificationError(f"the CoreML model is not what was asked for: {'; '.join(faults)}: report this")


@dataclass(frozen=True)
class Wanted:
    """What a model has to be.

    Attributes:
        inputs: sorted sizes by function; outputs: how many each has.
        types: that inputs and outputs may have.
        states, rounded: as in :class:`CoreMLFunction`, of each.
        operators: that may stand in it.
    """

    inputs: dict[str, list[list[int]]]
    outputs: int
    types: frozenset[str]
    states: dict[str, list[int]]
    rounded: dict[str, int]
    operators: frozenset[str]

    @classmethod
    def stateless(cls, module: HostEvicted, config: CacheConfig, counts: dict[str, int], precision: str) -> Wanted:
        """Of graphs that get the cache; linear layers are rounded as ``precision`` has it, but for gates'."""
        inputs = {}
        for name, count in counts.items():
            *tables, past = module.inputs(config, count)
            inputs[name] = sorted(list(table.shape) for table in (*tables, *past))
        layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and GATE not in name]
        return cls(
            inputs,
            len(module.names()[1]),
            frozenset(["FLOAT32", "FLOAT16"]),
            {},
            {kind: len(layers)} if (kind := _ROUNDED[precision]) else {},
            OPERATORS | (_QUANTIZING if precision == "8a8w" else frozenset()),
        )

    def stateful(self, where: dict[str, list[int]], states: dict[str, list[int]]) -> Wanted:
        """Of graphs that hold the cache as ``states``, and are told by an input ``where`` to write new rows."""
        slots = sorted(states.values())
        inputs = {
            name: sorted([*(size for size in sizes if size not in slots), where[name]])
            for name, sizes in self.inputs.items()
        }
        return Wanted(
            inputs,
            self.outputs - len(states),
            self.types | {"INT32"},
            states,
            self.rounded,
            self.operators | _WRITING,
        )


def read_package(program: bytes) -> CoreMLModel:
    """Reads the CoreML model of a ``.pte`` whose methods are one delegate each.

    Raises:
        VerificationError: there is none, or more than one.
    """
    with quiet():
        from executorch.backends.apple.coreml import executorchcoreml
    with tempfile.TemporaryDirectory() as scratch:
        executorchcoreml.unflatten_directory_contents(_blob(program), scratch)
        return read_folder(Path(scratch))


def read_folder(folder: Path) -> CoreMLModel:
    """Reads the one CoreML model that lies somewhere in ``folder``."""
    with quiet():
        import coremltools
    (model,) = folder.rglob("*.mlmodel")
    weights = sum(path.stat().st_size for path in folder.rglob("weight.bin"))
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
    from coremltools.proto import MIL_pb2
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

    operations = [op for block in body.block_specializations.values() for op in block.operations]
    rounded = [op for op in operations if op.type == _CONSTANT]
    types = [op.inputs["data"].arguments[0].value.type.tensorType.dataType for op in rounded]
    border = [*described.input, *described.output]
    states = {entry.name: entry.type.stateType.arrayType for entry in described.state}
    if wide := [name for name, array in states.items() if array.dataType != ArrayFeatureType.FLOAT16]:
        raise VerificationError(f"states {', '.join(wide)} are not float16: report this")
    return CoreMLFunction(
        {entry.name: list(entry.type.multiArrayType.shape) for entry in described.input},
        {entry.name: list(entry.type.multiArrayType.shape) for entry in described.output},
        sorted({ArrayFeatureType.ArrayDataType.Name(entry.type.multiArrayType.dataType) for entry in border}),
        dict(sorted(Counter(op.type for op in operations).items())),
        {name: list(array.shape) for name, array in states.items()},
        dict(Counter(map(MIL_pb2.DataType.Name, types))),
    )
