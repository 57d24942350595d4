"""Splits a frozen base over processes (FSDP2): each holds a part of every decoder layer and gathers one at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def shard_base(base: Any, gates: nn.ModuleList, device: torch.device) -> None:
    """Shards the decoder layers in place and moves the rest to `device`.

    Gates stay whole in each process: they are small, `rg10` ties them over layers, and DDP averages their gradients.
    Embedding and head stay whole too (they may be one tensor). The process group must exist.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    gates.to(device)
    whole = set(gates.parameters())
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    inside = {parameter for layer in base.model.layers for parameter in layer.parameters()}
    for module in base.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in inside:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    outside = {parameter for parameter in base.model.parameters() if parameter not in inside}
    # The root holds nothing itself: it lets the next layer be gathered while one computes.
    fully_shard(base.model, mesh=mesh, reshard_after_forward=True, ignored_params=whole | outside)
