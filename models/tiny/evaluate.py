"""Reproduces the model card's tables: `python -m trimkv_edge.models.tiny.evaluate --output FILE`."""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, load_gates
from trimkv_edge.models.registry import MODELS
from trimkv_edge.models.tiny import bounded, data
from trimkv_edge.models.tiny.tokenizer import WEIGHTS, load_tokenizer
from trimkv_edge.training.backends import FullAttention

BUFFER = 32
SINKS = 4
GATES = tuple(MODELS["tiny"].gates)


def load(name: str) -> GatedModel:
    """The shipped model with its gates called `name`, float32."""
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    gates, _ = load_gates(WEIGHTS.parent / "gates" / f"{name}.safetensors", GateShape.of(base.config))
    return GatedModel(base, gates).eval().requires_grad_(False)


def recall_streams(seed: int, rows: int, length: int, facts: int = 8, updates: int = 2) -> tuple[Tensor, Tensor]:
    """Ids and kinds [rows, length] of dialogues whose text comes from files that training never saw."""
    rng = random.Random(f"evaluate {seed} {length}")
    dialogues = [data.late_dialogue(rng, length, facts, facts, updates, held_out=True) for _ in range(rows)]
    ids, kinds, _ = data.to_batch(rng, dialogues, length, jump_share=0.0)
    return ids, kinds


def recall(model: GatedModel, cache: StaticCache, ids: Tensor, kinds: Tensor) -> float:
    """Share of asked values that are the most likely next token."""
    predicted = torch.cat([logits.argmax(-1) for logits in bounded.read(model, cache, ids)], 1)[:, :-1]
    asked = kinds[:, 1:] == data.ANSWER
    return (predicted == ids[:, 1:])[asked].float().mean().item()


def text_loss(model: GatedModel, cache: StaticCache, ids: Tensor) -> float:
    """Mean next-token loss of plain text in nats."""
    total, start = 0.0, 0
    for logits in bounded.read(model, cache, ids):
        target = ids[:, start + 1 : start + 1 + logits.shape[1]]
        each = torch.nn.functional.cross_entropy(logits[:, : target.shape[1]].transpose(1, 2), target, reduction="none")
        total += each.sum().item()
        start += logits.shape[1]
    return total / ids[:, 1:].numel()


def distance_recall(
    model: GatedModel, ids: Tensor, kinds: Tensor, texts: list[tuple[int, int, int]], distance: int
) -> float:
    """Full-attention recall when positions jump by `distance` in the middle of the text."""
    places = torch.arange(ids.shape[1])
    positions = torch.stack([places + distance * (places >= middle) for _, middle, _ in texts])
    with torch.no_grad():
        predicted = model(ids, positions, FullAttention(), last_only=False).argmax(-1)[:, :-1]
    asked = kinds[:, 1:] == data.ANSWER
    return (predicted == ids[:, 1:])[asked].float().mean().item()


def table(
    models: dict[str, GatedModel], lengths: list[int], budgets: list[int], rows: int, seed: int
) -> list[dict[str, Any]]:
    """One record per length and method: recall at each budget, held-out text loss at each budget."""
    records = []
    rng = random.Random(f"text {seed}")
    text = torch.tensor([data.random_text(rng, 2048, held_out=True) for _ in range(rows)])
    any_model = next(iter(models.values()))
    for length in lengths:
        ids, kinds = recall_streams(seed, rows, length)
        full = {
            "length": length,
            "method": "full cache",
            "recall": recall(any_model, bounded.full_cache(any_model, length, rows), ids, kinds),
            "text_loss": text_loss(any_model, bounded.full_cache(any_model, text.shape[1], rows), text),
        }
        records.append(full)
        print(full, flush=True)
        for method in (*models, "window"):
            model = models.get(method, any_model)
            for budget in budgets:
                policy, sinks = ("streaming", SINKS) if method == "window" else ("trimkv", 0)
                config = CacheConfig(budget, BUFFER, min(BUFFER, budget), policy, sinks)
                record = {
                    "length": length,
                    "method": method,
                    "budget": budget,
                    "recall": recall(model, bounded.make_cache(model, config, rows), ids, kinds),
                    "text_loss": text_loss(model, bounded.make_cache(model, config, rows), text),
                }
                records.append(record)
                print(record, flush=True)
    return records


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: load(name) for name in args.gates}
    records = table(models, args.lengths, args.budgets, args.rows, args.seed)
    rng = random.Random(f"distance {args.seed}")
    dialogues = [data.late_dialogue(rng, 512, 8, 8, 2, held_out=True) for _ in range(args.rows)]
    ids, kinds, _ = data.to_batch(rng, dialogues, 512, jump_share=0.0)
    distances = {
        distance: distance_recall(models[args.gates[0]], ids, kinds, [d.text for d in dialogues], distance)
        for distance in (0, 1_000, 10_000, 100_000)
    }
    text = data.random_text(rng, 20_000, held_out=True)
    size = len(load_tokenizer().decode(text, skip_special_tokens=False).encode())
    loss = next(r["text_loss"] for r in records if r["method"] == "full cache")
    result = {
        "buffer": BUFFER,
        "window_sinks": SINKS,
        "rows": args.rows,
        "seed": args.seed,
        "table": records,
        "recall_at_distance": distances,
        "text": {
            "nats_per_token": loss,
            "bits_per_byte": loss / math.log(2) * len(text) / size,
            "bytes_per_token": size / len(text),
        },
    }
    print(json.dumps({k: result[k] for k in ("recall_at_distance", "text")}))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
