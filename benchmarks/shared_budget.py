"""One budget for all heads against a budget for each, at equal bytes: decode steps and events, side by side.

    python benchmarks/shared_budget.py                       # tiny and a random model of 110 M parameters, 10 minutes
    python benchmarks/shared_budget.py --cases tiny          # 2 minutes

For each case the caps of policy `global` are calibrated for a budget of M entries per head on average. The policy with
a budget for each head (`trimkv`) then gets as many entries as fit into the same bytes. Both engines start from caches
full of random entries, as many in each head as the policy left there in calibration, and take turns: B decode steps
and the event that ends them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import ENGINES, exported, median, open_engine, parser, save

from trimkv_edge.caps import CAPS_FILE, load_calibration
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.pooled_engine import PooledEngine
from trimkv_edge.runtime.artefact import Artefact

# hidden size, intermediate size, layers, heads, KV heads, vocabulary: about 110 M parameters each.
_GROUPED = (768, 2048, 12, 12, 4, 32000)
_CASES: dict[str, tuple[tuple[int, ...] | None, int, int]] = {
    # name: (shape, budget, buffer)
    "tiny": (None, 128, 128),
    "tiny-10k": (None, 1152, 128),
    "110m": (_GROUPED, 512, 128),
    "110m-100k": (_GROUPED, 1920, 128),
    "110m-1m": ((768, 2048, 12, 12, 12, 32000), 6784, 128),
}


@contextmanager
def model_folder(shape: tuple[int, ...] | None) -> Iterator[dict[str, Any]]:
    """Settings of :class:`ExportRequest` that name the model."""
    if shape is None:
        yield {"model": "tiny", "gates": "rg10"}
        return
    hidden, inner, layers, heads, kv_heads, vocabulary = shape
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield {"model": folder, "random_weights": True, "gates": "rg10"}


def full_state(engine: Engine, mean: np.ndarray) -> CacheState:
    """Random entries: each head as full as the policy keeps it; just after an event."""
    rng = np.random.default_rng(0)
    rows = (engine.num_layers, engine.num_kv_heads)
    seen = engine.config.budget + 64 * engine.config.buffer
    kept = np.full(rows, engine.config.budget)
    if isinstance(engine, PooledEngine):
        assert engine.config.caps is not None
        caps = np.array(engine.config.caps)
        kept = np.minimum(np.floor(mean).astype(np.int64), caps)
        while (missing := engine.config.budget * kept.size - int(kept.sum())) > 0:
            room = caps - kept
            kept += np.minimum(np.ceil(missing * room / room.sum()).astype(np.int64), room)
            while kept.sum() > engine.config.budget * kept.size:
                kept[np.unravel_index(kept.argmax(), rows)] -= 1
    most = int(kept.max())
    dead = np.arange(most) >= kept[..., None]
    key, value = (rng.standard_normal((*rows, most, engine.head_dim)).astype(np.float32) for _ in range(2))
    log_beta = -rng.exponential(1e-3, (*rows, most)).astype(np.float32)
    positions = np.stack([np.sort(rng.choice(seen, most, replace=False)) for _ in range(kept.size)])
    positions = positions.reshape(*rows, most).astype(np.int64)
    for table, empty in ((key, 0), (value, 0), (log_beta, 0), (positions, -1)):
        table[dead] = empty
    if isinstance(engine, PooledEngine):
        return CacheState(seen, key, value, log_beta, positions, kept, 0)
    return CacheState(seen, key, value, log_beta, positions)


def window(engine: Engine, tokens: list[int]) -> tuple[float, float]:
    """Median seconds of a decode step over one ring, and seconds of the event that ends it."""
    steps = []
    for token in tokens:
        started = time.perf_counter()
        engine.decode(token)
        steps.append(time.perf_counter() - started)
    started = time.perf_counter()
    engine.evict()
    return median(steps), time.perf_counter() - started


def measure(folders: dict[str, Path], name: str, threads: int, rounds: int, mean: np.ndarray) -> dict[str, Any]:
    """Both policies in one engine kind, taking turns."""
    rng = np.random.default_rng(1)
    engines = {policy: open_engine(folder, name, threads) for policy, folder in folders.items()}
    for engine in engines.values():
        engine.load_state(full_state(engine, mean))
    times: dict[str, list[tuple[float, float]]] = {policy: [] for policy in engines}
    for turn in range(rounds + 1):
        for policy in list(engines)[:: 1 if turn % 2 else -1]:
            engine = engines[policy]
            tokens = rng.integers(3, engine.vocab_size, engine.config.buffer).tolist()
            spent = window(engine, tokens)
            if turn:
                times[policy].append(spent)
    result: dict[str, Any] = {"engine": name}
    for policy, engine in engines.items():
        step, event = (median(column) for column in zip(*times[policy], strict=True))
        manifest = Artefact.load(folders[policy], verify=False).manifest
        result[policy] = {
            "budget": engine.config.budget,
            "buffer": engine.config.buffer,
            "kept_entries": engine.entries,
            "competing_entries": engine.num_layers * engine.num_kv_heads * engine.config.slots,
            "cache_bytes": manifest.bytes.cache,
            "ms_per_step": round(step * 1e3, 4),
            "ms_per_event": round(event * 1e3, 4),
            "event_share": round(event / (engine.config.buffer * step), 5),
        }
    ratios = [a[0] / b[0] for a, b in zip(times["global"], times["trimkv"], strict=True)]
    result["step_ratio"] = round(median(ratios), 4)
    return result


def run_case(case: str, engines: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Exports both policies at equal bytes and measures them in every engine."""
    shape, budget, buffer = _CASES[case]
    with model_folder(shape) as model:
        shared = {**model, "buffer": buffer, "targets": tuple(engines)}
        with exported(**shared, policy="global", budget=str(budget)) as pooled:
            calibration = load_calibration(pooled / CAPS_FILE)
            size = Artefact.load(pooled, verify=False).manifest.bytes.cache
            with exported(**shared, policy="trimkv", budget=f"{size / 2**10 + 0.5:.3f}KB") as uniform:
                folders = {"global": pooled, "trimkv": uniform}
                mean = np.array(calibration.occupancy.mean)
                found = [measure(folders, name, threads, rounds, mean) for name in engines]
    caps = np.array(calibration.cache.caps)
    return {
        "case": case,
        "survivor_agreement": round(calibration.agreement, 5),
        "caps_min_mean_max": [int(caps.min()), round(float(caps.mean()), 1), int(caps.max())],
        "engines": found,
    }


def main() -> None:
    options = parser("shared budget against a budget for each head, at equal bytes", "shared_budget")
    options.add_argument("--cases", nargs="+", default=["tiny", "110m"], choices=list(_CASES))
    options.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--rounds", type=int, default=9, help="windows of B steps and an event, for each policy")
    args = options.parse_args()
    results = []
    for case in args.cases:
        results.append(run_case(case, args.engines, args.threads, args.rounds))
        print(json.dumps(results[-1], indent=1), flush=True)
    save(args.output, "shared_budget", results)


if __name__ == "__main__":
    main()
