"""How close a compiler's target comes to the float32 model, on tiny with its trained gates.

    python benchmarks/npu_accuracy.py                                   # npu:hexagon in Qualcomm's emulator, 15 min
    python benchmarks/npu_accuracy.py --target tosa --precisions fp32 int8

Each precision reads the same held-out text as the eager model, one token at a time once the cache is full. *Survivors*:
the share of kept entries that both keep, over all events; ``own`` lets each follow its own past, ``event`` gives the
target the eager model's entries after every event, so that it counts what one event does. *Greedy*: calls whose most
likely token is the same. Perplexity of the text, and recall of facts in dialogues, each beside the eager model's.
"""

from __future__ import annotations

import json
import math
import random
import time
from typing import Any

import numpy as np
import torch
from common import exported, open_engine, parser, read_stream, save, shared
from full_vs_budget import answered

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine, FloatArray, IntArray
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.tiny.data import late_dialogue, random_text
from trimkv_edge.models.tiny.evaluate import load
from trimkv_edge.runtime.artefact import Artefact

BUFFER = 32


def read(engine: Engine, text: list[int]) -> tuple[FloatArray, list[IntArray]]:
    """Logits after each token from that on which fills the cache, and what was kept at each event."""
    logits, kept = read_stream(engine, text)
    return np.stack(logits[-(len(text) - engine.config.slots) - 1 :]), kept


def share(one: list[IntArray], other: list[IntArray]) -> float:
    """Share of survivors that both keep, over all events."""
    return sum(shared(*pair) for pair in zip(one, other, strict=True)) / sum(kept.size for kept in one)


def by_event(reference: Engine, engine: Engine, text: list[int]) -> float:
    """The same share where the engine starts from the reference's entries after every event."""
    for one in (reference, engine):
        one.reset()
    want: list[IntArray] = []
    got: list[IntArray] = []
    at = 0
    while at < len(text):
        count = min(reference.config.prefill_chunk, reference.room, len(text) - at)
        for one in (reference, engine):
            one.prefill(text[at : at + count])
        at += count
        if reference.room == 0:
            for one, kept in ((reference, want), (engine, got)):
                one.evict()
                kept.append(one.survivors())
            engine.load_state(reference.state())
    return share(want, got)


def perplexity(logits: FloatArray, text: list[int]) -> float:
    """Of the last tokens of ``text``, each predicted by the row before it."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(-1)
    likely = rows[np.arange(len(rows)), text[-len(rows) :]] - peak - np.log(np.exp(rows - peak[:, None]).sum(-1))
    return math.exp(-likely.mean())


def main() -> None:
    options = parser("accuracy of compiled targets on tiny", "npu_accuracy")
    options.add_argument("--target", default="npu:hexagon")
    options.add_argument("--precisions", nargs="+", help="default: all of the target")
    options.add_argument("--engine", help="that runs the target (default: its own)")
    options.add_argument("--gates", nargs="+", default=["rg"])
    options.add_argument("--budget", type=int, default=224)
    options.add_argument("--text", type=int, default=1104)
    options.add_argument("--dialogues", type=int, default=4)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rng = random.Random(20261128)
    text = random_text(rng, args.text, held_out=True)
    dialogues = [
        late_dialogue(rng, 1024, facts=8, questions=8, updates=2, held_out=True) for _ in range(args.dialogues)
    ]
    config = CacheConfig(args.budget, BUFFER, BUFFER)
    # Other rows stay.
    stored = json.loads(args.output.read_text())["results"] if args.output.exists() else []
    precisions = args.precisions or TARGETS[args.target].ops
    done = {(args.target, precision, kind) for precision in precisions for kind in args.gates}
    results: list[dict[str, Any]] = [
        row for row in stored if (row["target"], row["precision"], row["gates"]) not in done
    ]
    for kind in args.gates:
        reference = eager_engine(load(kind), config, 2**24)
        logits, kept = read(reference, text)
        right, asked = (sum(x) for x in zip(*(answered(reference, one) for one in dialogues), strict=True))
        for precision in precisions:
            settings = dict(budget=str(args.budget), buffer=BUFFER, prefill_chunk=BUFFER, gates=kind)
            begun = time.perf_counter()
            with exported(targets=(args.target,), ops=(precision,), **settings) as folder:
                made = time.perf_counter() - begun
                name = args.engine or Artefact.load(folder, verify=False).manifest.targets[args.target].engine
                engine = open_engine(folder, name, args.threads)
                found, survivors = read(engine, text)
                row = {
                    "target": args.target,
                    "precision": precision,
                    "engine": name,
                    "gates": kind,
                    "budget": args.budget,
                    "buffer": BUFFER,
                    "tokens": len(text),
                    "events": len(kept),
                    "survivors_own": round(share(kept, survivors), 5),
                    "survivors_event": round(by_event(reference, engine, text), 5),
                    "greedy": round(float((logits.argmax(-1) == found.argmax(-1)).mean()), 5),
                    "greedy_calls": len(logits),
                    "largest_logit_difference": round(float(np.abs(logits - found).max()), 4),
                    "perplexity": round(perplexity(found, text), 4),
                    "perplexity_float32": round(perplexity(logits, text), 4),
                    "recall": round(sum(answered(engine, one)[0] for one in dialogues) / asked, 4),
                    "recall_float32": round(right / asked, 4),
                    "answer_tokens": asked,
                    "export_s": round(made, 1),
                }
            results.append(row)
            print(row, flush=True)
            save(args.output, "npu_accuracy", results)


if __name__ == "__main__":
    main()
