"""Weights that are in memory only while XNNPACK packs the part of the graph that uses them.

ExecuTorch would hold every weight three times: in the model, in the partitions' programs and packed. Here a model is
traced and partitioned without the weights of its linear layers; each partition gets its own just before XNNPACK's
``preprocess``, and what that packs goes to a file (``FileBackedData``, ExecuTorch's own) until the program is written.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from trimkv_edge.errors import VerificationError
from trimkv_edge.export.executorch_quantize import Late

# Smaller blocks are not worth a file.
_SPILLED = 2**16


class LateWeights:
    """Makes missing weights when they are packed.

    Args:
        late: by module name, see :class:`~trimkv_edge.export.executorch_quantize.Traceable`.
        prefix: name of the model in the exported program.
        scratch: folder for packed weights, or None to keep them in memory.
    """

    def __init__(self, late: Mapping[str, Late], prefix: str, scratch: Path | None) -> None:
        self._prefix = prefix
        self._late = {f"{prefix}.{name}": make for name, make in late.items()}
        self._scratch = scratch
        self._used: set[str] = set()

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Within, XNNPACK gets the weights."""
        from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

        plain = XnnpackBackend.preprocess

        def preprocess(program: ExportedProgram, specs: list[Any]) -> Any:
            made = self.fill(program)
            result = plain(program, specs)
            # Cycles keep the program, and what its passes made of it, until some later garbage collection.
            for tensor in made:
                tensor.data = tensor.data.new_empty(0)
            if self._scratch is not None:
                store = result.data_store_output
                store.buffers[:] = [_spill(block, self._scratch) for block in store.buffers]
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

    def fill(self, program: ExportedProgram) -> list[Tensor]:
        """Puts the missing weights of a program in place and returns them."""
        made: dict[str, dict[str, Tensor]] = {}
        for name in program.state_dict:
            module, _, own = name.rpartition(".")
            if module in self._late:
                if module not in made:
                    made[module] = self._late[module]()
                    self._used.add(module)
                program.state_dict[name] = made[module].get(own, program.state_dict[name])
        return [tensor for tensors in made.values() for tensor in tensors.values()]

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


def _spill(block: Any, folder: Path) -> Any:
    from executorch.exir._serialize._cord import FileBackedData

    if not isinstance(block, bytes) or len(block) < _SPILLED:
        return block
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".packed", delete=False) as file:
        file.write(block)
    return FileBackedData(file.name, cleanup=True)
