"""Gate files: safetensors of one gate per layer, with a JSON of the same name beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trimkv_edge.errors import ModelError
from trimkv_edge.manifest import GateInfo, file_sha256
from trimkv_edge.models.family import text_config
from trimkv_edge.models.published import PICKLES, read_config, read_layers, settle_tied
from trimkv_edge.retention import build_gates

PUBLISHED_FILES = ("trimkv_weights.pth", "trimkv_weights.safetensors")
GATE_FILES = ("gates.safetensors", *PUBLISHED_FILES)


@dataclass(frozen=True)
class GateShape:
    """What gates must fit: the base model's layers, width, KV heads and activation."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    act: str

    @classmethod
    def of(cls, config: Any) -> GateShape:
        """From a transformers configuration."""
        text = text_config(config)
        return cls(text.num_hidden_layers, text.hidden_size, text.num_key_value_heads, text.hidden_act)


def declared_shape(fields: dict[str, Any], path: Path) -> GateShape:
    """What a gate repository's ``config.json`` (:func:`~trimkv_edge.models.published.read_config`) says it fits.

    Raises:
        ModelError: a field is missing or has an impossible value.
    """
    for name in ("num_hidden_layers", "hidden_size", "num_key_value_heads"):
        value = fields.get(name)
        if type(value) is not int or not 0 < value < 10**6:
            raise ModelError(f"{path}: {name} is {value!r}, but gates need a positive number")
    act = fields.get("hidden_act")
    if type(act) is not str:
        raise ModelError(f"{path}: hidden_act is {act!r}, but gates need the name of an activation")
    return GateShape(
        fields["num_hidden_layers"], fields["hidden_size"], fields["num_key_value_heads"], fields["hidden_act"]
    )


def check_declared(fields: dict[str, Any], config: Path, kind: str, width: int, path: Path) -> None:
    """Raises :class:`ModelError` if a gate repository's configuration names another kind or width than its file."""
    for name, value in (("retention_gate", kind), ("retention_gate_intermediate_size", width)):
        if fields.get(name, value) != value:
            raise ModelError(f"{config} says {name} = {fields[name]!r}, but {path} holds {value!r}")


def random_gates(kind: str, shape: GateShape, intermediate_size: int, seed: int) -> nn.ModuleList:
    """Untrained gates for shape work; their log-betas are spread over heads and tokens so that evictions differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gates = build_gates(
            kind, shape.num_layers, shape.hidden_size, shape.num_kv_heads, intermediate_size, shape.act, bias_init=3.0
        )
        with torch.no_grad():
            for parameter in gates.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5 * 3)
    return gates


def save_gates(gates: nn.ModuleList, path: Path, info: dict[str, Any]) -> None:
    """Writes ``path`` (safetensors, published key names; shared tensors once per layer) and its ``.json``.

    ``info``: ``kind``, ``num_layers``, ``num_kv_heads``, ``hidden_size``, ``intermediate_size``, ``hidden_act``,
    ``base_model``, ``base_sha256`` (gates of other weights are refused, and of another activation), ``memory``
    (trained M per head); of trained gates ``steps``, ``training``, ``metrics``; of imported ones ``source``.
    """
    tensors = {
        f"model.layers.{layer}.self_attn.retention_gate.{name}": tensor.detach().clone().contiguous()
        for layer, gate in enumerate(gates)
        for name, tensor in gate.state_dict().items()
    }
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def load_gates(
    path: Path,
    shape: GateShape,
    base_sha256: str | None = None,
    tied_copy: str = "refuse",
    source: str | None = None,
) -> tuple[nn.ModuleList, GateInfo]:
    """Reads gates and checks that they fit the base model.

    Args:
        path: a ``.safetensors`` file or a published ``.pth``, or a folder with one; the kind follows from its keys.
        shape: the base model's sizes.
        base_sha256: hash of the base weights; compared with the JSON's ``base_sha256`` if both are there.
        tied_copy: see :func:`trimkv_edge.models.published.settle_tied`.
        source: what the user called the gates, for the manifest; by default the path.

    Raises:
        ModelError: no such file, another format, or gates of another model.
    """
    asked, path = path, gate_file(path)
    config = path.with_name("config.json")
    published = (path.suffix in PICKLES or path.name in PUBLISHED_FILES) and config.is_file()
    fields = read_config(config) if published else {}
    if published and (declared := declared_shape(fields, config)) != shape:
        raise ModelError(f"{config} describes gates for {declared}, but the model is {shape}: wrong gates")
    widest = max(shape.hidden_size, 1024)
    per_layer = widest * (shape.hidden_size + widest + shape.num_kv_heads + 2) + shape.num_kv_heads
    layers = read_layers(path, shape.num_layers * per_layer)
    if sorted(layers) != list(range(shape.num_layers)):
        raise ModelError(
            f"{path} has gates for {len(layers)} layers, but the model has {shape.num_layers}: wrong gates"
        )
    kind = "rg10" if "linear3.weight" in layers[0] else "rg"
    width = layers[0]["linear1.weight"].shape[0] if "linear1.weight" in layers[0] else 0
    gates = build_gates(kind, shape.num_layers, shape.hidden_size, shape.num_kv_heads, max(width, 1), shape.act)
    for layer, gate in enumerate(gates):
        expected = {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in layers[layer].items()}
        if given != expected:
            raise ModelError(
                f"{path}, layer {layer}: gate tensors {given} do not fit the model, which needs {expected}"
            )
    check_declared(fields, config, kind, width, path)
    if kind == "rg10":
        settle_tied(layers, path, tied_copy)
    for layer, gate in enumerate(gates):
        gate.load_state_dict({name: tensor.float() for name, tensor in layers[layer].items()})
    info = _recorded(path)
    recorded, act = info.get("base_sha256"), info.get("hidden_act", shape.act)
    if act != shape.act:
        raise ModelError(
            f"{path} was trained with the activation {act!r}, but the model has {shape.act!r}: wrong gates"
        )
    if base_sha256 and recorded and recorded != base_sha256:
        raise ModelError(
            f"{path} was trained for base weights {recorded[:12]}..., but these are {base_sha256[:12]}...: "
            "use the gates of this model, or train new ones"
        )
    return gates, GateInfo(kind, source or str(asked), file_sha256(path), int(width))


def gate_file(path: Path) -> Path:
    """The gate file itself: ``path``, or in a folder ``gates.safetensors`` (ours) or a published file.

    Raises:
        ModelError: the folder holds none of them.
    """
    if not path.is_dir():
        return path
    for name in GATE_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path} holds no gate file: one of {', '.join(GATE_FILES)} must be there")


def _recorded(path: Path) -> dict[str, Any]:
    """The JSON beside a gate file; empty if there is none."""
    info = path.with_suffix(".json")
    return read_config(info) if info.is_file() else {}
