"""Weights that are in memory only while XNNPACK packs the part of the graph that uses them.

ExecuTorch would hold every weight three times: in the model, in the partitions' programs and packed. Here a model is
traced and partitioned without the weights of its linear layers; each partition gets its own just before XNNPACK's
``preprocess``, and what that packs goes to a file (``FileBackedData``, ExecuTorch's own) until the program is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from trimkv_edge.errors import VerificationError
from trimkv_edge.export.executorch_parts import PackedParts, part_name
from trimkv_edge.export.executorch_quantize import Late
from trimkv_edge.export.heap import trim


class LateWeights:
    """Makes missing weights when they are packed.

    Args:
        late: by module name, see :class:`~trimkv_edge.export.executorch_quantize.Traceable`.
        prefix: name of the model in the exported program.
        parts: where packed weights go; those that it has are not packed again.
        progress: called with (bytes of weights packed, bytes in all).
    """

    def __init__(
        self,
        late: Mapping[str, Late],
        prefix: str,
        parts: PackedParts,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._prefix = prefix
        self._late = {f"{prefix}.{name}": weights for name, weights in late.items()}
        self._parts, self._progress = parts, progress
        self._used: set[str] = set()

    @property
    def total(self) -> int:
        """Bytes of all late weights, packed."""
        return sum(late.bytes for late in self._late.values())

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Within, XNNPACK gets the weights."""
        from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

        plain = XnnpackBackend.preprocess

        def preprocess(program: ExportedProgram, specs: list[Any]) -> Any:
            modules = self._modules(program)
            name = part_name(program, specs, {tensor for tensor in program.state_dict if _owner(tensor) in modules})
            result = self._parts.find(name)
            if result is None:
                made = self.fill(program)
                result = plain(program, specs)
                # Cycles keep the program, and what its passes made of it, until some later garbage collection.
                for tensor in made:
                    tensor.data = tensor.data.new_empty(0)
                self._parts.put(name, result, sum(self._late[module].bytes for module in modules))
                trim()
            self._used |= modules
            if modules and self._progress:
                self._progress(sum(self._late[module].bytes for module in self._used), self.total)
            return result

        def without_tensors(_: type, program: ExportedProgram, specs: list[Any]) -> ExportedProgram:
            return copy.deepcopy(program, {id(tensor): tensor for tensor in program.state_dict.values()})

        XnnpackBackend.preprocess = staticmethod(preprocess)
        XnnpackBackend.copy_exported_program_for_preprocess = classmethod(without_tensors)
        try:
            yield
        finally:
            XnnpackBackend.preprocess = staticmethod(plain)
            del XnnpackBackend.copy_exported_program_for_preprocess  # again that of its base class
            _forget_nodes()

    def fill(self, program: ExportedProgram) -> list[Tensor]:
        """Puts the missing weights of a program in place and returns them."""
        made = {module: self._late[module].make() for module in sorted(self._modules(program))}
        self._used |= made.keys()
        for name in program.state_dict:
            own = name.rpartition(".")[2]
            program.state_dict[name] = made.get(_owner(name), {}).get(own, program.state_dict[name])
        return [tensor for tensors in made.values() for tensor in tensors.values()]

    def _modules(self, program: ExportedProgram) -> set[str]:
        return {_owner(name) for name in program.state_dict} & self._late.keys()

    def check_used(self, model: nn.Module) -> None:
        """Raises :class:`~trimkv_edge.errors.VerificationError` if a layer's weights never got into the program.

        Args:
            model: what was traced; layers may share a module.
        """
        modules = dict(model.named_modules(remove_duplicate=False, prefix=self._prefix))
        used = {id(modules[name]) for name in self._used}
        for name in self._late:
            if id(modules[name]) not in used:
                raise VerificationError(f"the executorch program lacks the weights of {name}: report this")


def _forget_nodes() -> None:
    """Empties what ExecuTorch's partitioner keeps in globals: a node there keeps its graph, and with it every buffer of
    the program, for the rest of the process."""
    from executorch.backends.xnnpack.partition.config import (
        gemm_configs,
        generic_node_configs,
        node_configs,
        xnnpack_config,
    )
    from executorch.exir.backend.utils import is_same_node

    is_same_node.cache_clear()
    for module in (gemm_configs, generic_node_configs, node_configs, xnnpack_config):
        module.why.node = None


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
