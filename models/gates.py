"""Gate files: safetensors of one gate per layer, with a JSON of the same name beside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimkv_edge.errors import ModelError
from trimkv_edge.manifest import GateInfo, file_sha256
from trimkv_edge.retention import build_gates

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.retention_gate\.([a-z0-9.]+)$")
_SHARED = ("linear3.weight", "bias")


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
        return cls(config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.hidden_act)


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
    """Writes ``path`` (safetensors, published key names; shared tensors once per layer) and its ``.json``."""
    tensors = {
        f"model.layers.{layer}.self_attn.retention_gate.{name}": tensor.detach().clone().contiguous()
        for layer, gate in enumerate(gates)
        for name, tensor in gate.state_dict().items()
    }
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def load_gates(path: Path, shape: GateShape, base_sha256: str | None = None) -> tuple[nn.ModuleList, GateInfo]:
    """Reads gates and checks that they fit the base model.

    Args:
        path: a ``.safetensors`` file; the kind follows from its keys.
        shape: the base model's sizes.
        base_sha256: hash of the base weights; compared with the JSON's ``base_sha256`` if both are there.

    Raises:
        ModelError: no such file, another format, or gates of another model.
    """
    if path.suffix in (".pth", ".pt", ".bin"):
        raise ModelError(f"{path} is a pickle, which is never loaded here: convert the gates to .safetensors first")
    if not path.is_file():
        raise ModelError(f"no gate file at {path}: give --gates a .safetensors file of retention gates")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error})") from error
    layers = _by_layer(tensors, path)
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
        for name in _SHARED if kind == "rg10" else ():
            if not torch.equal(layers[layer][name], layers[0][name]):
                raise ModelError(
                    f"{path}: {name} must be shared by all layers, but layer {layer}'s copy differs from layer 0's"
                )
        gate.load_state_dict({name: tensor.float() for name, tensor in layers[layer].items()})
    recorded = _recorded_base(path)
    if base_sha256 and recorded and recorded != base_sha256:
        raise ModelError(
            f"{path} was trained for base weights {recorded[:12]}..., but these are {base_sha256[:12]}...: "
            "use the gates of this model, or train new ones"
        )
    return gates, GateInfo(kind, str(path.name), file_sha256(path), int(width))


def _by_layer(tensors: dict[str, Tensor], path: Path) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.search(key)
        if not match:
            raise ModelError(f"{path} holds {key!r}, which is not a retention gate's tensor")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    return layers


def _recorded_base(path: Path) -> str | None:
    info = path.with_suffix(".json")
    if not info.is_file():
        return None
    try:
        return json.loads(info.read_text(encoding="utf-8")).get("base_sha256")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{info} is not a JSON object ({error})") from error
