"""Seeded random weights as a folder of safetensors in the hub's layout, for work on shapes, memory and speed.

They are loaded like real weights, so what is measured with them holds for real ones. A tensor follows from the seed and
its name alone, whatever else is in its file. Written once, then reused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from trimkv_edge.budget import format_bytes
from trimkv_edge.errors import BudgetError, ConfigError, ModelError
from trimkv_edge.files import new_folder
from trimkv_edge.models.registry import MODELS
from trimkv_edge.models.source import RANDOM_FORMAT, ModelSource

CACHE_VARIABLE = "TRIMKV_CACHE"
SHARD_BYTES = 2 * 10**9
MARKER = "random_weights.json"
_INDEX = "model.safetensors.index.json"
_BLOCK = 2**20
# Of a folder that gives the shape: what is taken over as it is.
_TAKEN = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RandomWeights:
    """Where the random weights of a model are, or will be.

    Attributes:
        folder: in the cache.
        shapes: of the stored tensors by name; a tied output layer is not stored.
        dtype: as stored.
        architecture: transformers' class.
        marker: what the folder's ``random_weights.json`` says when it is complete.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    architecture: str
    marker: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.size(name) for name in self.shapes)

    @property
    def ready(self) -> bool:
        """Whether the folder was written to the end, by this recipe."""
        return _complete(self.folder, self.marker)

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shapes[name]) * self.dtype.itemsize

    def shards(self) -> list[list[str]]:
        """Names by file, in the model's order, each file of at most ``SHARD_BYTES`` or one tensor."""
        shards: list[list[str]] = []
        filled = 0
        for name in self.shapes:
            if not shards or filled + self.size(name) > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self.size(name)
        return shards


def cache_folder() -> Path:
    """``$TRIMKV_CACHE``, or ``trimkv-edge`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimkv-edge"


def plan_random_weights(source: ModelSource, seed: int) -> RandomWeights:
    """Names, sizes and place of the random weights of ``source``; nothing is written.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must be >= 0")
    model = source.outline()
    digest = source.weights_sha256(seed)
    marker = {
        "format": RANDOM_FORMAT,
        "model": source.name,
        "seed": seed,
        "dtype": str(source.stored_dtype).removeprefix("torch."),
        "sha256": digest,
    }
    # Two folders may have the same shape and different tokenizers.
    own = hashlib.sha256(digest.encode())
    for path in _taken(source):
        own.update(path.read_bytes())
    name = Path(source.name).name or "model"
    folder = cache_folder() / "random-weights" / f"{name}-{own.hexdigest()[:12]}-seed{seed}"
    if source.folder is not None and _complete(source.folder, marker):
        folder = source.folder
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    return RandomWeights(folder, shapes, source.stored_dtype, type(model).__name__, marker)


def ensure_random_weights(source: ModelSource, seed: int, progress: Progress | None = None) -> ModelSource:
    """Writes the random weights of ``source``, unless they are there, and gives the source with their folder.

    Norms are 1, biases 0, matrices and embeddings normal with the configuration's ``initializer_range``, as a new
    model's. The memory needed is that of one file. The folder appears complete or not at all.

    Args:
        source: of random weights.
        seed: 0 or more.
        progress: called with (bytes done, bytes in all); default: a bar, where stderr is a terminal.

    Raises:
        BudgetError: the disk has no room for them.
        ModelError: they cannot be written.
        ConfigError: a negative seed.
    """
    plan = plan_random_weights(source, seed)
    if not plan.ready:
        try:
            plan.folder.parent.mkdir(parents=True, exist_ok=True)
            # Several processes of one training, or two commands, may want the same folder.
            with FileLock(plan.folder.with_name(f".{plan.folder.name}.lock")):
                if not plan.ready:
                    _write(plan, source, progress)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"random weights cannot be written to {plan.folder}: {' '.join(str(error).split())[:300]}: "
                f"set {CACHE_VARIABLE} to a folder that can hold {format_bytes(plan.bytes)}"
            ) from error
    return replace(source, folder=plan.folder)


def _write(plan: RandomWeights, source: ModelSource, progress: Progress | None) -> None:
    # Left by a process that was killed; nobody else writes while the lock is held.
    for left in plan.folder.parent.glob(f".{plan.folder.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(plan.folder.parent).free
    if plan.bytes > free:
        raise BudgetError(
            f"random weights of {source.name} take {format_bytes(plan.bytes)} in {plan.folder.parent}, where "
            f"{format_bytes(free)} are free: free some, or set {CACHE_VARIABLE} to a folder on another disk"
        )
    show = progress is None and sys.stderr.isatty()
    with (
        tqdm(total=plan.bytes, desc="random weights", unit="B", unit_scale=True, leave=False, disable=not show) as bar,
        new_folder(plan.folder) as folder,
    ):
        done, files = 0, {}
        shards = plan.shards()
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for name, tensor in _made(plan, names, source.text_config.initializer_range):
                tensors[name] = tensor
                done += plan.size(name)
                bar.update(plan.size(name))
                if progress:
                    progress(done, plan.bytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors lets nobody else read it
            files.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            _save(folder / _INDEX, {"metadata": {"total_size": plan.bytes}, "weight_map": files})
        for path in _taken(source):
            shutil.copyfile(path, folder / path.name)
        fields = _save_config(plan, source, folder)
        if not (folder / "generation_config.json").is_file():
            named = MODELS.get(source.name)
            ends = (named.stops if named else []) or fields.get("eos_token_id")
            tokens = {"bos_token_id": fields.get("bos_token_id"), "eos_token_id": ends}
            _save(folder / "generation_config.json", tokens | {"pad_token_id": fields.get("pad_token_id")})
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        _save(folder / MARKER, plan.marker | {"files": sizes})


def _made(plan: RandomWeights, names: list[str], std: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, as they are ready."""
    # numpy's generators work outside Python's lock, and give the same numbers on every machine.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        made = pool.map(lambda name: _tensor(name, plan.shapes[name], plan.dtype, std, plan.marker["seed"]), names)
        yield from zip(names, made, strict=True)


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest)))
    tensor = torch.empty(shape, dtype=dtype)
    for block in tensor.view(-1).split(_BLOCK):  # float32 needs no more room than one block
        block.copy_(torch.from_numpy(generator.standard_normal(block.numel(), np.float32)).mul_(std))
    return tensor


def _taken(source: ModelSource) -> list[Path]:
    if source.folder is None:
        return []
    return [source.folder / name for name in _TAKEN if (source.folder / name).is_file()]


def _save_config(plan: RandomWeights, source: ModelSource, folder: Path) -> dict[str, Any]:
    """``config.json`` as in the folder that gave the shape, or as on the hub."""
    if source.folder is not None:
        fields: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    else:
        fields = {"model_type": source.family.model_type, **MODELS[source.name].shape}
    fields.pop("auto_map", None)  # names code that is not taken over
    _save(folder / "config.json", {**fields, "architectures": [plan.architecture]})
    read = replace(source, config=AutoConfig.from_pretrained(folder))
    if read.weights_sha256(plan.marker["seed"]) != plan.marker["sha256"]:  # the source's configuration was changed
        fields = source.config.to_dict()
        _save(folder / "config.json", {**fields, "architectures": [plan.architecture]})
    return fields


def _complete(folder: Path, marker: dict[str, Any]) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = found.pop("files")
        return found == marker and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
