"""From what a user calls a model to a folder of weights, or to a shape for random ones."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trimkv_edge.budget import ModelShape
from trimkv_edge.errors import ModelError
from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.family import Family, text_config
from trimkv_edge.models.registry import MODELS, family_of

TINY = Path(__file__).parent / "tiny"
RANDOM_FORMAT = 1  # of random weights: raised when the same seed would give other numbers
_WEIGHTS = "model*.safetensors"
_NO_SHAPE = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
_SMALL = ["*.json", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what the user typed.
        origin: hub id, folder, or ``shipped``.
        folder: weights and tokenizer; with random weights the folder that the shape came from, None for a named one,
            until :func:`~trimkv_edge.models.random_weights.ensure_random_weights` makes one.
        config: transformers configuration.
        gates: default gate of each kind: file or hub id.
    """

    name: str
    origin: str
    folder: Path | None
    config: Any
    family: Family
    gates: dict[str, str]
    random_weights: bool

    def shape(self, gate_parameters: int = 0) -> ModelShape:
        """Sizes that memory depends on; weights are counted without being allocated."""
        config = self.text_config
        parameters = sum(parameter.numel() for parameter in self.outline().parameters())
        return ModelShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            parameters=parameters + gate_parameters,
        )

    def outline(self) -> Any:
        """The model without weights: names and sizes of its tensors, on torch's meta device."""
        with torch.device("meta"):
            # A copy: transformers notes the dtype in the configuration it is given.
            return self.family.auto.from_config(copy.deepcopy(self.config), dtype=torch.float32)

    @property
    def text_config(self) -> Any:
        """The decoder's part of ``config``."""
        return text_config(self.config)

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the weights are stored in: what the configuration says, else float32."""
        named = getattr(self.config, "dtype", None) or torch.float32
        dtype = getattr(torch, named, None) if isinstance(named, str) else named
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ModelError(f"{self.name}: dtype {named!r} in its config.json is not known: use bfloat16 or float32")
        return dtype

    def weights_sha256(self, seed: int = 0) -> str:
        """Hash over the weight files; for random weights over shape, dtype and ``seed``, which they follow from."""
        if self.folder is None or self.random_weights:
            fields = self.config.to_dict()
            for name in _NO_SHAPE:
                fields.pop(name, None)
            recipe = [RANDOM_FORMAT, seed, str(self.stored_dtype), fields]
            return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        files = sorted(self.folder.glob(_WEIGHTS))
        if len(files) == 1:
            return file_sha256(files[0])
        return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def find_source(
    name: str, weights: Path | None = None, random_weights: bool = False, *, vision: bool = False
) -> ModelSource:
    """Resolves a registry name, a local folder or a hub id.

    Args:
        name: as given to ``--model``.
        weights: folder that holds the weights of ``name`` (``--weights``).
        random_weights: no weights are read; the shape comes from the folder's config or the registry.
        vision: whether the caller can do with a model that reads pictures; others are given text models only.

    Raises:
        ModelError: nothing usable found; the message says what was looked for and what to give.
    """
    source = _find(name, weights, random_weights, vision)
    _check_vision(name, source.family, vision)
    return source


def _check_vision(name: str, family: Family, vision: bool) -> None:
    if family.vision and not vision:
        raise ModelError(
            f"--model {name}: {family.name} models read pictures; trimkv-export takes them and its artefacts run "
            "(docs/vision.md), but this command is for text models: choose one"
        )


def _find(name: str, weights: Path | None, random_weights: bool, vision: bool) -> ModelSource:
    entry = MODELS.get(name)
    if entry is not None:
        _check_vision(name, family_of(entry.family), vision)  # before gigabytes are downloaded for nothing
    given = weights or (Path(name) if entry is None and Path(name).is_dir() else None)
    if given is None and entry is not None and not entry.repo:
        own = Path(__file__).parent / name.replace("-", "_")
        gates = {kind: str(own / "gates" / f"{file}.safetensors") for kind, file in entry.gates.items()}
        return _from_folder(name, "shipped", own / "weights", gates, random_weights)
    if given is not None:
        if weights is not None and random_weights and not (given / "config.json").is_file():
            raise ModelError(f"--random-weights with --weights {given} reads its config.json, and there is none")
        return _from_folder(name, str(given), given, dict(entry.gates) if entry else {}, random_weights)
    if random_weights and entry is not None:
        if not entry.shape:
            raise ModelError(
                f"the shape of {name} is not part of this package: add --weights DIR, a folder with its config.json"
            )
        # A copy: transformers completes the nested fields in place.
        config = AutoConfig.for_model(entry.family, **entry.fields())
        return ModelSource(name, entry.repo, None, config, family_of(entry.family), dict(entry.gates), True)
    repo = entry.repo if entry else name
    folder = _download(name, repo, entry is not None, random_weights)
    return _from_folder(name, repo, folder, dict(entry.gates) if entry else {}, random_weights)


def _from_folder(name: str, origin: str, folder: Path, gates: dict[str, str], random_weights: bool) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json: give a folder with config.json, *.safetensors and tokenizer files"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {_one_line(error)}") from error
    family = family_of(config.model_type)
    family.check(config)
    if not random_weights and not list(folder.glob(_WEIGHTS)):
        raise ModelError(f"{folder} holds no {_WEIGHTS}: convert the weights to safetensors (pickles are not loaded)")
    return ModelSource(name, origin, folder, config, family, gates, random_weights)


def _download(name: str, repo: str, named: bool, random_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not named and (repo.count("/") != 1 or repo.startswith((".", "/"))):
        raise ModelError(
            f"--model {name}: no such folder, and not a known name; known names: {', '.join(MODELS)}; "
            "or give a hub id (owner/name) or a folder"
        )
    try:
        wanted = _SMALL if random_weights else [_WEIGHTS, *_SMALL]
        return Path(snapshot_download(repo, allow_patterns=wanted, etag_timeout=5))
    except HFValidationError as error:
        raise ModelError(f"--model {name}: not a hub id, folder or known name ({_one_line(error)})") from error
    except Exception as error:  # the hub client's transport errors share no base class
        also = ", or --random-weights for shape work" if named else ""
        raise ModelError(
            f"--model {name}: {repo!r} is neither in the local hub cache nor can it be downloaded now "
            f"({type(error).__name__}): give --weights DIR, a folder with config.json, *.safetensors and "
            f"tokenizer files{also}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
