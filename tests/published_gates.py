"""Writes gate repositories in the published layout, from raw tensors and without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

TEXT, VISION = "model.", "model.language_model."


def raw_gates(kind: str, layers: int, hidden: int, heads: int, width: int, prefix: str = TEXT) -> dict[str, Tensor]:
    """Seeded bfloat16 tensors under the published key names."""
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.5).bfloat16()

    last, bias = make(heads, width), make(heads)
    tensors = {}
    for layer in range(layers):
        gate = {"linear1.weight": make(width, hidden), "linear1.bias": make(width), "bias": bias.clone()}
        if kind == "rg":
            gate |= {"linear2.weight": make(heads, width), "bias": make(heads)}
        else:
            gate |= {
                "linear2.weight": make(width, width),
                "linear2.bias": make(width),
                "linear3.weight": last.clone(),
            }
        tensors |= {f"{prefix}layers.{layer}.self_attn.retention_gate.{name}": t for name, t in gate.items()}
    return tensors


def write_published(
    folder: Path, tensors: dict[str, Tensor], kind: str, layers: int, hidden: int, heads: int, width: int, nest: bool
) -> Path:
    """``config.json`` (fields nested in ``text_config`` if ``nest``) and ``trimkv_weights.pth``."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "base_model": "owner/base",
        "retention_gate": kind,
        "retention_gate_intermediate_size": width,
        "memory_size": 512.0,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps({"text_config": fields} if nest else fields), encoding="utf-8")
    torch.save(tensors, folder / "trimkv_weights.pth")
    return folder
