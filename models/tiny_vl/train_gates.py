"""Train retention gates on the frozen network: `python -m trimkv_edge.models.tiny_vl.train_gates --output FILE`.

The losses of `trimkv-train` (`trimkv_edge.training`), which itself trains text models only.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

from trimkv_edge.manifest import file_sha256
from trimkv_edge.models.gates import GateShape, load_gates, save_gates
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.tiny import data as tiny
from trimkv_edge.models.tiny_vl.batches import Batch
from trimkv_edge.models.tiny_vl.dialogues import ROW, SEEN
from trimkv_edge.models.tiny_vl.forward import embed, last_hidden
from trimkv_edge.models.tiny_vl.gate_rows import make_rows
from trimkv_edge.models.tiny_vl.tokenizer import WEIGHTS
from trimkv_edge.retention import build_gates
from trimkv_edge.training.backends import DecayedAttention, FullAttention
from trimkv_edge.training.losses import capacity
from trimkv_edge.training.retained import retained, skipped

ANSWER_WEIGHT = 20.0
WEIGHTS_OF = {tiny.ANSWER: ANSWER_WEIGHT, SEEN: ANSWER_WEIGHT, tiny.RANDOM: 0.0, ROW: 0.0}
WIDTH = 64


def losses(model: GatedVisionModel, made: tuple[Batch, Tensor, Tensor], memory: float, scope: str) -> dict[str, Tensor]:
    """Cross-entropy and forward KL per weighted token, and the capacity loss per row."""
    batch, index, skips = made
    base = model.base
    with torch.no_grad():
        embedded = embed(base, batch)
        teacher = last_hidden(base, batch, embedded, FullAttention())
    backend = DecayedAttention(index)
    hidden = last_hidden(base, batch, embedded, backend)
    held = torch.stack(
        [retained(backend.log_beta[n], index) + skipped(backend.log_beta[n], skips) for n in range(len(model.gates))]
    )
    places = torch.arange(index.shape[1]).expand_as(index)
    kinds = batch.kinds[:, 1:].flatten()
    used = kinds != ROW
    weight = torch.tensor([WEIGHTS_OF.get(kind, 1.0) for kind in kinds[used].tolist()])
    given = F.log_softmax(base.lm_head(hidden[:, :-1].flatten(0, 1)[used]), -1)
    wanted = F.log_softmax(base.lm_head(teacher[:, :-1].flatten(0, 1)[used]), -1)
    ce = F.nll_loss(given, batch.ids[:, 1:].flatten()[used], reduction="none")
    kl = (wanted.exp() * (wanted - given)).sum(-1)
    return {
        "ce": (ce * weight).sum() / weight.sum(),
        "kl": (kl * weight).sum() / weight.sum(),
        "capacity": capacity(held, places, memory, scope=scope).mean(),
    }


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("rg", "rg10"), default="rg10")
    parser.add_argument("--base", type=Path, default=WEIGHTS)
    parser.add_argument("--memory", type=float, default=32)
    parser.add_argument("--length", type=int, default=640)
    parser.add_argument("--longest", type=int, default=50_000)
    parser.add_argument("--rounds", type=float, default=0.0, help="share of rows that are conversations in rounds")
    parser.add_argument("--crowded", type=float, default=0.0, help="share of rows where other things go on")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--bias-init", type=float, default=8.0)
    parser.add_argument("--capacity-weight", type=float, default=1.0)
    parser.add_argument("--init-gates", type=Path, help="continue from this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).requires_grad_(False)
    shape = GateShape.of(base.config)
    gates = build_gates(
        args.kind, shape.num_layers, shape.hidden_size, shape.num_kv_heads, WIDTH, shape.act, bias_init=args.bias_init
    )
    if args.init_gates:
        gates, _ = load_gates(args.init_gates, shape)
    model = GatedVisionModel(base, gates).eval()
    scope = "global" if args.kind == "rg10" else "head"
    optimizer = torch.optim.AdamW(gates.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    warmup, began, measured = max(1, args.steps // 10), time.time(), {}
    for step in range(args.steps):
        rng = random.Random(f"gates {args.seed} {step}")
        rate = args.lr * min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        made = make_rows(rng, args.rows, args.length, args.longest, args.rounds, args.crowded)
        parts = losses(model, made, args.memory, scope)
        optimizer.zero_grad()
        (parts["ce"] + parts["kl"] + args.capacity_weight * parts["capacity"]).backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        measured = {name: part.item() for name, part in parts.items()}
        if (step + 1) % 10 == 0:
            line = " ".join(f"{name} {value:.4f}" for name, value in measured.items())
            print(f"step {step + 1} {line} seconds {time.time() - began:.0f}", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            save_gates(torch.nn.ModuleList(model.gates), args.output, info(args, shape, scope, step + 1, measured))


def info(
    args: argparse.Namespace, shape: GateShape, scope: str, steps: int, metrics: dict[str, float]
) -> dict[str, Any]:
    """What the JSON beside the gates says."""
    return {
        "kind": args.kind,
        "intermediate_size": WIDTH,
        "hidden_act": shape.act,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "hidden_size": shape.hidden_size,
        "base_model": "tiny-vl",
        "base_sha256": file_sha256(args.base / "model.safetensors"),
        "memory": args.memory,
        "steps": steps,
        "training": {
            "length": args.length,
            "longest_skip": args.longest,
            "rounds": args.rounds,
            "crowded": args.crowded,
            "scope": scope,
            "capacity_form": "paper",
            "capacity_weight": args.capacity_weight,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "bias_init": args.bias_init,
            "batch": args.rows,
            "seed": args.seed,
            "init_gates": file_sha256(args.init_gates) if args.init_gates else "",
        },
        "metrics": metrics,
    }


if __name__ == "__main__":
    main()
