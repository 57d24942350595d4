"""Reads gate tensors as they are published: a pickled dict (``trimkv_weights.pth``) or safetensors, and nothing else.

Layout: research notes on the authors' released files (arXiv 2512.03324, 2605.09649): one flat dict, keys
``model[.language_model].layers.N.self_attn.retention_gate.*``.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimkv_edge.errors import ModelError

PICKLES = (".pth", ".pt", ".bin")
TIED_COPIES = ("refuse", "first", "last")
_KEY = re.compile(
    r"^((?:model\.)?(?:language_model\.)?(?:model\.)?)layers\.(\d{1,4})\.self_attn\.retention_gate\."
    r"(linear[123]\.weight|linear[12]\.bias|bias)$"
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHARED = ("linear3.weight", "bias")
_SLACK = 4 << 20  # bytes that a container's own records may take
_TORCH = (2, 10)  # earlier weights_only unpicklers have known holes


def read_layers(path: Path, max_values: int | None = None) -> dict[int, dict[str, Tensor]]:
    """Gate tensors by layer and name, in their stored dtype.

    Args:
        path: a ``.pth`` (read with ``weights_only``, so it runs no code) or a ``.safetensors`` file.
        max_values: values the gates may hold at most; a file too large for it is refused before it is read.

    Raises:
        ModelError: missing, damaged, too large, a foreign key, dtype or value, or NaN/inf.
    """
    if not path.is_file():
        raise ModelError(f"no gate file at {path}: give a .safetensors or .pth file, or a folder that holds one")
    if max_values is not None and path.stat().st_size > 4 * max_values + _SLACK:
        raise ModelError(
            f"{path} is {path.stat().st_size} bytes, but gates of this model take {4 * max_values} at most"
        )
    tensors = _read_pickle(path) if path.suffix in PICKLES else _read_safetensors(path)
    layers: dict[int, dict[str, Tensor]] = {}
    prefixes = set()
    for key, tensor in tensors.items():
        match = _KEY.match(key) if isinstance(key, str) else None
        if not match:
            raise ModelError(f"{path} holds {str(key)[:80]!r}, which is not a retention gate's tensor")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelError(f"{path}: {key} is {what}, but must be a tensor of bfloat16, float16 or float32")
        # A stride of 0 lets a few stored bytes claim any shape.
        if tensor.numel() * tensor.element_size() > path.stat().st_size:
            raise ModelError(f"{path}: {key} claims shape {tuple(tensor.shape)}, which is more than the file holds")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: {key} holds NaN or infinite values: the file is damaged or training diverged")
        prefixes.add(match[1])
        layer = layers.setdefault(int(match[2]), {})
        if match[3] in layer:
            raise ModelError(
                f"{path} holds {match[3]} of layer {match[2]} twice, under {' and '.join(sorted(prefixes))}"
            )
        layer[match[3]] = tensor
    if not layers:
        raise ModelError(f"{path} holds no gate tensors")
    return layers


def settle_tied(layers: dict[int, dict[str, Tensor]], path: Path, tied_copy: str = "refuse") -> None:
    """Makes the shared tensors of ``rg10`` equal in all layers, in place.

    ``last`` takes the last layer's copy, which plain ``load_state_dict`` on tied modules leaves active.

    Raises:
        ModelError: copies differ and ``tied_copy`` is ``refuse``.
    """
    order = sorted(layers)
    for name in _SHARED:
        chosen = layers[order[-1 if tied_copy == "last" else 0]][name]
        differ = [layer for layer in order if not torch.equal(layers[layer][name], chosen)]
        if differ and tied_copy == "refuse":
            most = max(float((layers[layer][name].float() - chosen.float()).abs().max()) for layer in differ)
            raise ModelError(
                f"{path}: {name} must be shared by all layers, but {len(differ)} of {len(order)} copies differ from "
                f"layer {order[0]}'s (by {most:.3g} at most; layer {differ[0]}'s copy differs first): to choose one, "
                "use trimkv-import-gates --tied-copy last (what plain load_state_dict leaves active) or first"
            )
        for layer in differ:
            layers[layer][name] = chosen


def read_config(path: Path) -> dict[str, Any]:
    """A gate repository's ``config.json``; fields of ``text_config`` (vision-language models) win."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config", {})
        return {**config, **text}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is not a readable JSON object ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error})") from error


def _read_pickle(path: Path) -> dict[Any, Any]:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _TORCH:
        raise ModelError(f"torch {torch.__version__} is too old to read {path} safely: install torch >= 2.10")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ModelError(f"{path} is a compressed zip, which torch.save never writes: not read")
            damaged = archive.testzip()  # torch.load does not compare the checksums
        if damaged is not None:
            raise ModelError(f"{path} is damaged ({damaged} fails its checksum): download it again")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{path} is not a readable file of tensors ({type(error).__name__}: {reason})") from error
    if not isinstance(tensors, dict):
        raise ModelError(f"{path} holds a {type(tensors).__name__}, but must hold a dict of tensors")
    return tensors
