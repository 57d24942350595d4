"""A folder of random weights in the hub's layout that every peer is built from, and what transformers makes of it."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from shapes import SHAPES, Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from trimkv_edge.models.gates import GateShape, random_gates, save_gates

PROMPT, CONTINUED = 48, 16
_SHARD = 2 * 10**9
_GATE_WIDTH = 1024  # of published Phi-3 gates


def make(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Writes weights (bfloat16 safetensors), tokenizer, random gates and ``reference.json`` into an empty folder."""
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    _write_weights(folder, config, seed)
    _write_tokenizer(folder, shape.vocabulary)
    gates = random_gates("rg", GateShape.of(config), min(_GATE_WIDTH, shape.hidden), seed)
    save_gates(gates, folder / "gates.safetensors", {"kind": "rg", "source": f"random (seed {seed})"})
    reference = json.dumps(_reference(folder, shape.reference))
    (folder / "reference.json").write_text(reference + "\n", encoding="utf-8")


def _write_weights(folder: Path, config: Any, seed: int) -> None:
    """Tensor by tensor, each from its own generator: memory is one shard, and no tensor depends on another."""
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, index = 0, {}
    for name, like in names.items():
        if size and size + 2 * like.numel() > _SHARD:
            _save_shard(folder, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
            size = 0
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        tensor = torch.ones(like.shape) if like.ndim == 1 else torch.empty(like.shape)
        if like.ndim > 1:
            tensor.normal_(std=config.initializer_range, generator=generator)
        shards[-1][name] = tensor.bfloat16()
        size += 2 * like.numel()
        index[name] = len(shards)
    _save_shard(folder, len(shards), shards[-1])
    for number in range(1, len(shards) + 1):
        (folder / f"{number}.part").rename(folder / _shard_name(number, len(shards)))
    if len(shards) > 1:
        listing = {"metadata": {}, "weight_map": {name: _shard_name(n, len(shards)) for name, n in index.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")


def _save_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word for each id; builders want one, and nothing else reads it."""
    special = ["<unk>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate(special + [f"w{n}" for n in range(len(special), vocabulary)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


@torch.no_grad()
def _reference(folder: Path, dtype: str) -> dict[str, Any]:
    """Logits after a prompt and the greedy continuation, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompt = np.random.default_rng(1).integers(3, model.config.vocab_size, PROMPT).tolist()
    cache, given, rows = DynamicCache(config=model.config), prompt, []
    for _ in range(CONTINUED):
        rows.append(model(torch.tensor([given]), past_key_values=cache, logits_to_keep=1).logits[0, -1].float())
        given = [int(rows[-1].argmax())]
    greedy = [int(logits.argmax()) for logits in rows]
    return {"dtype": dtype, "prompt": prompt, "logits": rows[0].tolist(), "greedy": greedy}


if __name__ == "__main__":
    make(Path(sys.argv[2]), SHAPES[sys.argv[1]])
