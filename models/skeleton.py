"""A model whose large weights are not in memory: traced as it is, filled tensor by tensor when numbers are needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_edge.errors import ModelError
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.registry import family_of

# Name of a parameter of a GatedModel -> its float32 values, which the caller may change.
Weights = Callable[[str], Tensor]
_INDEX = "model.safetensors.index.json"
_BASE = "base."
# Elements that are read at once.
_BLOCK = 2**24


class WeightFiles:
    """Tensors of a folder of safetensors files, read when asked for and then forgotten.

    Args:
        folder: ``model*.safetensors``, sharded or not.

    Raises:
        ModelError: a file cannot be read, or the index names one that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        index = folder / _INDEX
        try:
            if index.is_file():
                named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._file = {name: folder / Path(file).name for name, file in named.items()}
            else:
                for path in sorted(folder.glob("model*.safetensors")):
                    with safe_open(path, "pt") as file:
                        self._file.update(dict.fromkeys(file.keys(), path))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"weights in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        missing = sorted({path.name for path in self._file.values() if not path.is_file()})
        if missing:
            raise ModelError(f"weights in {folder} lack the file {missing[0]} that {_INDEX} names: copy it again")

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor, from the header alone."""
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def __call__(self, name: str) -> Tensor:
        """The tensor in float32."""
        made = torch.empty(self.shape(name))
        if not made.dim():
            with self._open(name) as file:
                return made.copy_(file.get_tensor(name))
        rows = max(1, _BLOCK * len(made) // max(1, made.numel()))
        for start in range(0, len(made), rows):
            # Opened anew each time: the pages of an open map would count as this process's memory.
            with self._open(name) as file:
                made[start : start + rows] = file.get_slice(name)[start : start + rows]
        return made

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self._file[name], "pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self._file[name]} cannot be read: {error}: copy it again") from error


def skeleton(config: Any) -> PreTrainedModel:
    """The causal LM of ``config`` with every parameter a view of one zero: all shapes, no memory."""
    with torch.device("meta"):
        base: PreTrainedModel = family_of(config.model_type).auto.from_config(config, dtype=torch.float32)
    for owner in list(base.modules()):
        for name, child in list(owner.named_children()):
            if hasattr(child, "inv_freq"):  # buffers that are computed, not loaded
                setattr(owner, name, type(child)(child.config))
    hollow(base)
    return base.eval()


def hollow(module: nn.Module) -> None:
    """Takes the memory of all parameters away; shapes, and what is shared, stay."""
    zero = torch.zeros(1)
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
            setattr(owner, name, made[id(parameter)])


def fits(base: PreTrainedModel, files: WeightFiles) -> bool:
    """Whether the files hold every tensor of the model under its own name, in its shape."""
    return all(name in files and files.shape(name) == tuple(p.shape) for name, p in base.named_parameters())


def parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each parameter once: full name, the module that owns it and its name there."""
    seen = set()
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, owner, name


def filled(model: GatedModel, weights: Weights) -> GatedModel:
    """A copy of a hollow model with all its weights in memory, float32."""
    memo: dict[int, Any] = {
        id(getattr(owner, own)): nn.Parameter(weights(name), requires_grad=False)
        for name, owner, own in parameter_slots(model)
    }
    # What is in the memo counts as copied already, wherever it is shared.
    return copy.deepcopy(model, memo)


def model_weights(model: nn.Module) -> Weights:
    """Copies of the weights that a model has in memory."""
    return lambda name: model.get_parameter(name).detach().to(torch.float32, copy=True)


def weights_of(files: WeightFiles, gates: nn.ModuleList) -> Weights:
    """Base weights from files, gates from memory."""
    marker = ".self_attn.retention_gate."
    own = [model_weights(gate) for gate in gates]

    def load(name: str) -> Tensor:
        if marker not in name:
            return files(name.removeprefix(_BASE))
        place, parameter = name.split(marker)
        return own[int(place.rsplit(".", 1)[1])](parameter)

    return load
