"""What bounded decoding costs at full size: events, late positions, memory, and how much of the bandwidth is used.

    python benchmarks/steady.py ARTEFACT ...             # phi-3-mini int4, M = 2048: about 10 minutes on 2 cores
    python benchmarks/steady.py ARTEFACT --rounds 20     # small models: more rounds, less noise

One cycle is B decode steps and the event that ends it. From one full cache three cycles take turns: as it is, without
the event (a plain ring of equal size that forgets without choosing), and as if the stream were ``--late`` tokens long
(same entries, later positions). Rows are added to those stored, by folder.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from common import copy_bandwidth, feed, median, open_engine, parser, rss, save
from eviction_overhead import Times, window

from trimkv_edge.engine import CacheState
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines.base import ArtefactEngine


def later(state: CacheState, seen: int) -> CacheState:
    """The same entries, as old as they were, in a stream of ``seen`` tokens."""
    return replace(state, seen=seen, positions=state.positions + (seen - state.seen))


def measure(engine: ArtefactEngine, rounds: int, late: int) -> dict[str, Any]:
    """Medians over rounds; ratios are medians of ratios within a round."""
    rng = random.Random(0)
    buffer, slots = engine.config.buffer, engine.config.slots
    feed(engine, rng.choices(range(engine.vocab_size), k=slots))
    early, start, grown = engine.state(), rss(), 0
    late += (early.seen - late) % buffer  # where an event just was
    at_late = later(early, late)
    times: dict[str, list[Times]] = {"events": [], "ring": [], "late": []}
    for turn in range(rounds + 1):
        tokens = rng.choices(range(engine.vocab_size), k=buffer)
        kinds = list(times)
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            engine.load_state(at_late if kind == "late" else early)
            timed = window(engine, tokens, kind != "ring")
            if turn:  # the first warms up
                times[kind].append(timed)
        grown = max(grown, rss() - start) if turn else 0
        start = start if turn else rss()
    wholes, events, gates = zip(*times["events"], strict=True)
    return {
        "ms_per_token": round(median(wholes) / buffer * 1e3, 4),
        "ms_per_event": round(median(events) * 1e3, 4),
        "event_share": round(median(event / whole for whole, event in zip(wholes, events, strict=True)), 5),
        "gates_share": round(median(gate / whole for whole, gate in zip(wholes, gates, strict=True)), 5),
        "against_ring": round(_ratio(times["events"], times["ring"]), 4),
        "late_to_early": round(_ratio(times["late"], times["events"]), 4),
        "positions": [early.seen, late],
        "rss_growth_bytes": grown,
    }


def _ratio(one: list[Times], other: list[Times]) -> float:
    return median(a[0] / b[0] for a, b in zip(one, other, strict=True))


def bandwidth(artefact: Artefact, seconds: float, copy: float) -> dict[str, Any]:
    """Bytes that a decode step must read (weights but the embedding and gates of their own, live entries), their rate.

    Args:
        seconds: of a step; copy: GB/s of a plain copy, reads and writes counted.
    """
    manifest = artefact.manifest
    bits = manifest.embedding_bits or SCHEMES[manifest.quantization].embedding_bits
    weights = manifest.bytes.weights - manifest.model.vocab_size * manifest.model.hidden_size * bits // 8
    gates = next(iter(manifest.targets.values())).files.get("gates_data")
    weights -= manifest.files[gates].bytes if gates else 0
    cache = manifest.bytes.cache * (manifest.cache.budget + manifest.cache.buffer / 2) / manifest.cache.slots
    rate = (weights + cache) / seconds / 1e9
    return {
        "weight_bytes": weights,
        "live_cache_bytes": round(cache),
        "gb_per_s": round(rate, 2),
        "copy_gb_per_s": copy,
        "of_copy": round(rate / copy, 3),
    }


def main() -> None:
    options = parser("events, late positions, memory and bandwidth of artefacts", "steady")
    options.add_argument("artefacts", type=Path, nargs="+", metavar="ARTEFACT")
    options.add_argument("--engine", help="default: the artefact's first")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--late", type=int, default=100_000, metavar="POSITION")
    options.set_defaults(threads=psutil.cpu_count(logical=False))
    args = options.parse_args()
    results = json.loads(args.output.read_text())["results"] if args.output.is_file() else {}
    copy = round(copy_bandwidth(args.threads), 1)
    for folder in args.artefacts:
        artefact = Artefact.load(folder, verify=False)
        name = args.engine or next(iter(artefact.manifest.targets))
        row = measure(open_engine(folder, name, args.threads), args.rounds, args.late)
        cache = artefact.manifest.cache
        row |= {"engine": name, "threads": args.threads, "budget": cache.budget, "buffer": cache.buffer}
        row |= {"kv_dtype": cache.kv_dtype, **bandwidth(artefact, row["ms_per_token"] / 1e3, copy)}
        where = folder.resolve()
        results[f"{where.parent.name}/{where.name} {name}"] = row
        print(folder.name, row, flush=True)
        save(args.output, "steady", results)


if __name__ == "__main__":
    main()
