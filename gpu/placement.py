"""Where a model's numbers lie, and in what type: copies of it for a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trimkv_edge.budget import check_fits
from trimkv_edge.errors import ConfigError
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def moved(
    model: GatedModel,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
) -> GatedModel:
    """A copy of the model on ``device``; what is there already in that type is shared.

    Gates keep float32, which ranks betas near 1 (see :mod:`trimkv_edge.retention`), and so do rotary frequencies.

    Args:
        model: hollow or not.
        dtype: of all other parameters.
        weights: values of a hollow model, read one by one.
    """
    place = find_device(str(device))
    gates = {id(parameter) for gate in model.gates for parameter in gate.parameters()}
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        kind = torch.float32 if id(parameter) in gates else dtype
        value = parameter.detach() if weights is None else weights(name)
        memo[id(parameter)] = nn.Parameter(value.to(place, kind), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(place)
    # What is in the memo counts as copied already, wherever it is shared.
    return copy.deepcopy(model, memo)


def home(model: GatedModel) -> tuple[torch.device, torch.dtype]:
    """The device of a model, and what it computes in."""
    weight = model.base.get_input_embeddings().get_parameter("weight")
    return weight.device, weight.dtype


def find_device(name: str | None = None) -> torch.device:
    """The device of that name; without one, CUDA if torch can use it, else the CPU.

    Raises:
        ConfigError: no such device, or torch cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} does not run the torch engine: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count() > 0:
        raise ConfigError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()}, from cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        raise ConfigError(
            "device cuda cannot be used: "
            + (f"torch was built for CUDA {built} but finds no GPU or driver" if built else "torch is a CPU build")
            + ": install a CUDA build of torch and the driver (docs/gpu.md), or use cpu"
        )
    return device


def check_fits_on(device: torch.device, needed: int, what: str) -> None:
    """Raises :class:`~trimkv_edge.errors.BudgetError` if ``needed`` bytes are more than the device has free."""
    check_fits(needed, f"{what} on {device}", torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None)
