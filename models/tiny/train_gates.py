"""Train the retention gates of `tiny` on its frozen base: `python -m trimkv_edge.models.tiny.train_gates --kind rg`."""

import argparse
import random
import time
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM

from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import save_gates
from trimkv_edge.models.tiny import data
from trimkv_edge.models.tiny.tokenizer import WEIGHTS
from trimkv_edge.retention import GATE_KINDS, build_gates
from trimkv_edge.training.gates import GateBatch, train_gates

GATES = WEIGHTS.parent / "gates"
ANSWER_WEIGHT = 20.0


def gate_batches(seed: int, length: int, rows: int, facts: int, longest: int) -> Iterator[GateBatch]:
    """Dialogues with facts early, text in the middle and questions late.

    Most rows skip a stretch of the text, log-uniform up to `longest` tokens: the facts are as old as in a stream of
    that length, and the capacity loss charges what the skipped text would still hold.
    """
    rng = random.Random(f"gates {seed}")
    while True:
        ids, index, weight, skips = [], [], [], []
        for row in range(rows):
            count = rng.randint(facts // 2, facts)
            dialogue = data.late_dialogue(rng, length, count, rng.randint(count // 2, count), rng.randint(0, 2))
            start, resume, end = dialogue.text
            places = torch.arange(length)
            if rng.random() < 0.75:
                gap = int(16 * (longest / 16) ** rng.random())
                around = (places >= start) & (places < end)
                places = places + gap * (places >= resume)
                skips.append((row, around, resume, gap))
            ids.append(torch.tensor(dialogue.ids))
            index.append(places)
            kinds = torch.tensor(dialogue.kinds)
            weight.append(torch.where(kinds == data.ANSWER, ANSWER_WEIGHT, torch.where(kinds == data.RANDOM, 0.0, 1.0)))
        yield GateBatch(torch.stack(ids), torch.stack(index), torch.stack(weight), skips)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=GATE_KINDS, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--memory", type=float, default=32.0, help="trained budget M per head")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--longest", type=int, default=100_000)
    parser.add_argument("--intermediate-size", type=int, default=64)
    parser.add_argument("--bias-init", type=float, default=8.0)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).requires_grad_(False)
    shape = base.config
    sizes = (shape.num_hidden_layers, shape.hidden_size, shape.num_key_value_heads, args.intermediate_size)
    gates = build_gates(args.kind, *sizes, shape.hidden_act, args.bias_init)
    model = GatedModel(base, gates)
    batches = gate_batches(args.seed, args.length, args.rows, args.facts, args.longest)
    began, recent = time.time(), []
    for step, parts in train_gates(model, gates, batches, args.steps, args.memory, args.kind == "rg10", args.lr):
        recent.append(parts)
        if step % 20 == 0 or step == args.steps:
            means = {name: round(sum(p[name] for p in recent) / len(recent), 4) for name in parts}
            print(f"step {step} {means} seconds {time.time() - began:.0f}", flush=True)
            recent = []
            info = {
                "kind": args.kind,
                "intermediate_size": args.intermediate_size,
                "hidden_act": shape.hidden_act,
                "num_layers": shape.num_hidden_layers,
                "num_kv_heads": shape.num_key_value_heads,
                "hidden_size": shape.hidden_size,
                "base_sha256": file_sha256(WEIGHTS / "model.safetensors"),
                "trained_memory": args.memory,
                "steps": step,
                "rows": args.rows,
                "length": args.length,
                "longest_skip": args.longest,
                "lr": args.lr,
                "seed": args.seed,
                "metrics": means,
            }
            GATES.mkdir(exist_ok=True)
            save_gates(gates, GATES / f"{args.kind}.safetensors", info)


if __name__ == "__main__":
    main()
