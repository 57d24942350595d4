"""What rounding the weights costs on tiny: survivors by bits of the gates, perplexity and recall by scheme.

    python benchmarks/quantization.py       # about 15 minutes

*Gates* (eager, so that only their rounding differs): the same stream through the same quantised base with float32 gates
and with gates of 8 and 4 bits; the share of kept entries that both keep, over all events, each cache following its own
past. *Schemes*: exported artefacts in their engines, activations rounded as they are when running.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import exported, feed, open_engine, parser, save
from full_vs_budget import answered

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import Engine
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.reference import ReferenceWeights
from trimkv_edge.export.targets import TARGETS
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.skeleton import model_weights
from trimkv_edge.models.tiny.bounded import make_cache
from trimkv_edge.models.tiny.data import late_dialogue, random_text
from trimkv_edge.models.tiny.evaluate import load, recall_streams

BUFFER = 32


@torch.no_grad()
def kept_alike(one: GatedModel, other: GatedModel, budget: int, ids: torch.Tensor) -> dict[str, Any]:
    """Share of survivors that two models both keep."""
    config = CacheConfig(budget, BUFFER, BUFFER)
    caches: list[StaticCache] = [make_cache(model, config, ids.shape[0]) for model in (one, other)]
    shared = total = events = 0
    for start in range(0, ids.shape[1], BUFFER):
        part = ids[:, start : start + BUFFER]
        for model, cache in zip((one, other), caches, strict=True):
            model(part, (torch.arange(part.shape[1]) + cache.seen).unsqueeze(0), cache)
            cache.advance(part.shape[1])
        if caches[0].live == config.slots:
            for cache in caches:
                cache.evict()
            rows = [cache.positions[..., :budget].flatten(0, 2).tolist() for cache in caches]
            shared += sum(len(set(a) & set(b)) for a, b in zip(*rows, strict=True))
            total += budget * len(rows[0])
            events += 1
    return {"agreement": round(shared / total, 5), "survivors": total, "events": events}


def gates_by_bits(target: str, scheme: Scheme, budgets: list[int], ids: torch.Tensor) -> list[dict[str, Any]]:
    """Agreement of quantised gates with float32 ones over the scheme's base."""
    rows = []
    for kind in ("rg", "rg10"):
        model = load(kind)

        def rounded(gate_bits: int, model: GatedModel = model) -> GatedModel:
            weights = ReferenceWeights(
                model, model_weights(model), replace(scheme, gate_bits=gate_bits), TARGETS[target].rounding
            )
            return weights.fill(model)

        exact = rounded(32)
        for bits in (8, 4):
            for budget in budgets:
                row = {"target": target, "scheme": scheme.name, "gates": kind, "gate_bits": bits, "budget": budget}
                rows.append({**row, **kept_alike(exact, rounded(bits), budget, ids)})
                print(rows[-1], flush=True)
    return rows


def perplexity(engine: Engine, text: list[int]) -> float:
    """Of held-out text after its first 256 tokens, read one at a time through the bounded cache."""
    engine.reset()
    feed(engine, text[:256])
    loss = 0.0
    for at in range(256, len(text) - 1):
        logits = engine.decode(text[at]).astype(np.float64)
        peak = logits.max()
        loss += peak + math.log(np.exp(logits - peak).sum()) - logits[text[at + 1]]
        if engine.room == 0:
            engine.evict()
    return math.exp(loss / (len(text) - 257))


def distinct_schemes(target: str) -> list[Scheme]:
    """Those that a target can build and run here; in onnx 8da4w is another name of int4, and bf16 for CUDA alone."""
    found = [scheme for scheme in SCHEMES.values() if target in scheme.targets]
    return [scheme for scheme in found if (target, scheme.name) not in (("onnx", "8da4w"), ("onnx", "bf16"))]


def forms(target: str) -> list[tuple[str, dict[str, Any]]]:
    """Schemes of a target, with the cache and the embedding as they come, and smaller ones."""
    found: list[tuple[str, dict[str, Any]]] = []
    for scheme in distinct_schemes(target):
        name = scheme.name
        found.append((name, {}))
        if target == "onnx" and "int8" in scheme.kv_dtypes:
            found.append((name, {"kv_dtype": "int8"}))
        if scheme.embedding_bits == 8:
            found.append((name, {"embedding_bits": 4}))
    return found


def schemes(target: str, args: Any) -> list[dict[str, Any]]:
    """Perplexity, recall, bytes and agreement of every scheme of a target."""
    rng = random.Random(20261124)
    dialogues = [
        late_dialogue(rng, 2048, facts=8, questions=8, updates=2, held_out=True) for _ in range(args.dialogues)
    ]
    text = random_text(rng, args.text, held_out=True)
    rows = []
    for kind in ("rg", "rg10"):
        for name, more in forms(target):
            settings = dict(budget=str(args.budget), buffer=BUFFER, prefill_chunk=BUFFER, gates=kind, quant=name)
            with exported(targets=(target,), **settings, **more) as folder:
                engine = open_engine(folder, target, args.threads)
                right, asked = (sum(x) for x in zip(*(answered(engine, d) for d in dialogues), strict=True))
                manifest = load_manifest(folder, verify_files=False)
                parity = manifest.targets[target].parity
                dynamic = parity.get("dynamic", parity)
                row = {
                    "target": target,
                    "scheme": name,
                    "kv_dtype": manifest.cache.kv_dtype,
                    "embedding_bits": manifest.embedding_bits or SCHEMES[name].embedding_bits,
                    "gates": kind,
                    "budget": args.budget,
                    "perplexity": round(perplexity(engine, text), 4),
                    "recall": round(right / asked, 4),
                    "answer_tokens": asked,
                    "cache_bytes": manifest.bytes.cache,
                    "bytes": sum(manifest.files[file].bytes for file in manifest.targets[target].files.values()),
                    "survivors_differ": dynamic["survivor_mismatches"] / dynamic["survivors"],
                    "greedy_differ": dynamic["greedy_mismatches"] / dynamic["steps"],
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    options = parser("quantisation on tiny", "quantization")
    options.add_argument("--budget", type=int, default=64)
    options.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 128])
    options.add_argument("--dialogues", type=int, default=24)
    options.add_argument("--text", type=int, default=4096)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--gates-only", action="store_true", help="leave out the exported artefacts")
    options.add_argument("--schemes-only", action="store_true", help="keep the stored rows of the gates")
    options.add_argument("--targets", nargs="+", default=["onnx", "executorch"])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    ids, _ = recall_streams(0, args.rows, 2048)
    results: dict[str, Any] = {"gates": [], "schemes": []}
    if args.schemes_only:
        results["gates"] = json.loads(args.output.read_text())["results"]["gates"]
    for target in args.targets:
        if not args.schemes_only:
            for scheme in distinct_schemes(target):
                if scheme.gate_bits == 8:
                    results["gates"] += gates_by_bits(target, scheme, args.budgets, ids)
        if not args.gates_only:
            results["schemes"] += schemes(target, args)
    save(args.output, "quantization", results)


if __name__ == "__main__":
    main()
