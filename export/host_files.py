"""What targets with host-evicted graphs share: one graph for each number of tokens, and files for their host."""

from __future__ import annotations

from pathlib import Path

from trimkv_edge.config import CacheConfig
from trimkv_edge.host_cache import MASKED
from trimkv_edge.host_constants import FORMAT, HostConstants
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import Weights, parameter_slots

EMBEDDING = "host_embedding.bin"


def chunks(config: CacheConfig) -> dict[str, int]:
    """Tokens of each graph by its name."""
    return {"decode": 1, **({"prefill": config.prefill_chunk} if config.prefill_chunk > 1 else {})}


def tokens(count: int) -> str:
    """A number of tokens, in words."""
    return f"{count} token{'s' if count > 1 else ''}"


def save_host(
    model: GatedModel, weights: Weights, folder: Path, constants: str, masked: float = MASKED
) -> dict[str, str]:
    """Writes what a host needs beside the graphs, and returns the files by role.

    Args:
        constants: name of the file of :class:`HostConstants`.
        masked: see :class:`~trimkv_edge.host_cache.HostCache`.
    """
    _save_embedding(model, weights, folder / EMBEDDING)
    rotary = model.base.model.rotary_emb
    frequencies = rotary.inv_freq.float().tolist()
    HostConstants(FORMAT, masked, frequencies, float(rotary.attention_scaling)).save(folder / constants)
    return {"embedding": EMBEDDING, "constants": constants}


def _save_embedding(model: GatedModel, weights: Weights, path: Path) -> None:
    """Rows of the embedding as little-endian float32, ``[vocabulary, hidden_size]``, without a header."""
    table = model.base.model.embed_tokens.weight
    name = next(name for name, owner, own in parameter_slots(model) if getattr(owner, own) is table)
    weights(name).numpy().astype("<f4", copy=False).tofile(path)
