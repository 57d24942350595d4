"""The ``torch`` target: weights in the hub's layout, their configuration, and the gates, for the torch engine.

A folder ``torch`` of the artefact holds ``config.json``, ``model*.safetensors`` (several files with an index, if they
are large) and ``gates.safetensors`` (none where the model has no gates). transformers loads it as any model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.quantization.bits import module_bits, parameter_bits
from trimkv_edge.files import replace_text
from trimkv_edge.gpu.artefact import CONFIG, FOLDER, GATES, INDEX, SINGLE
from trimkv_edge.gpu.placement import DTYPES
from trimkv_edge.manifest import Target
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, parameter_slots

SHARD = 2 * 2**30  # most bytes of a file, unless one tensor has more
_BASE = "base."
_GATE = ".retention_gate."


def export_torch(
    model: GatedModel,
    folder: Path,
    *,
    scheme: Scheme,
    weights: Weights,
    progress: Callable[[int, int], None] | None = None,
    shard: int = SHARD,
) -> Target:
    """Writes the weights as ``scheme`` stores them, a file at a time.

    Args:
        model: hollow or not; weights: its values by parameter name.
        folder: of the artefact.
        progress: called with bytes written and bytes in all.
        shard: most bytes of a file.

    Returns:
        the target, with the files that a runtime opens first.

    Raises:
        ConfigError: a model that reads pictures.
    """
    if model.config is not model.base.config:
        raise ConfigError("the torch target holds text models only: leave it out for a model that reads pictures")
    place = folder / FOLDER
    place.mkdir()
    kinds = _stored(model, scheme)
    files = {"config": CONFIG}
    config = copy.deepcopy(model.config)
    config.use_cache, config.architectures, config.dtype = True, [type(model.base).__name__], scheme.dtype
    config.to_json_file(place / CONFIG)
    gates = {name: kind for name, kind in kinds.items() if _GATE in name}
    if gates:
        save_file(dict(_gate_tensors(model, weights, gates)), place / GATES)
        files["gates"] = GATES
    base = {name: kind for name, kind in kinds.items() if _GATE not in name}
    files["weights"] = _save_base(model, place, weights, base, progress or (lambda done, total: None), shard)
    return Target("torch", "compiled", {role: f"{FOLDER}/{name}" for role, name in files.items()})


def round_trip(weight: Tensor, bits: int, dtype: str) -> Tensor:
    """What a weight stored in ``bits`` stands for, float32; ``dtype``: of the scheme."""
    return weight.to(DTYPES[dtype]).float() if bits == 16 else weight


def _stored(model: GatedModel, scheme: Scheme) -> dict[str, torch.dtype]:
    """Type of each parameter."""
    bits = module_bits(model, scheme)
    return {
        name: DTYPES[scheme.dtype] if parameter_bits(bits.get(id(owner), 32), own) == 16 else torch.float32
        for name, owner, own in parameter_slots(model)
    }


def _gate_tensors(model: GatedModel, weights: Weights, kinds: dict[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Under the published names; what layers share once for each."""
    shared = {id(model.get_parameter(name)): name for name in kinds}
    for layer, gate in enumerate(model.gates):
        for own, parameter in gate.named_parameters():
            name = shared[id(parameter)]
            stored = weights(name).to(kinds[name]).contiguous().clone()
            yield f"model.layers.{layer}.self_attn.retention_gate.{own}", stored


def _save_base(
    model: GatedModel,
    place: Path,
    weights: Weights,
    kinds: dict[str, torch.dtype],
    progress: Callable[[int, int], None],
    shard: int,
) -> str:
    """The name of the only file, or of the index."""
    sizes = {name: model.get_parameter(name).numel() * kind.itemsize for name, kind in kinds.items()}
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > shard:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    places: dict[str, str] = {}
    total, done = sum(sizes.values()), 0
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name.removeprefix(_BASE): weights(name).to(kinds[name]).contiguous() for name in group}
        save_file(tensors, place / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        done += sum(sizes[name] for name in group)
        progress(done, total)
    if len(groups) == 1:
        return SINGLE
    index = {"metadata": {"total_size": total}, "weight_map": places}
    replace_text(place / INDEX, json.dumps(index, indent=2) + "\n")
    return INDEX
