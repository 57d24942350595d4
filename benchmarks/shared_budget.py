"""One budget for all heads against a budget for each, at equal bytes: decode steps and events, side by side.

    python benchmarks/shared_budget.py                       # tiny and a random model of 110 M parameters
    python benchmarks/shared_budget.py --cases 110m-100k     # others keep their stored results

Policy `global` has caps: calibrated on text for `tiny`, on random tokens for `110m`, and made up for the larger caches
(uneven like those of `tiny`: the largest head holds five times the mean). The policy with a budget for each head
(`trimkv`) gets as many entries as fit into the same bytes. Both engines start from caches full of random entries, as
many in each head as the policy left there in calibration, and take turns: B decode steps and the event that ends them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from common import ENGINES, exported, median, open_engine, parser, save

from trimkv_edge.calibration.calibrate import calibrate_sample
from trimkv_edge.calibration.streams import StreamPlan
from trimkv_edge.caps import Calibration, Occupancy
from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, Engine
from trimkv_edge.export import pipeline
from trimkv_edge.models.loading import LoadedModel, load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.pooled_engine import PooledEngine
from trimkv_edge.runtime.artefact import Artefact

# hidden size, intermediate size, layers, heads, KV heads, vocabulary: about 110 M parameters each.
_GROUPED, _MULTI_HEAD = (768, 2048, 12, 12, 4, 32000), (768, 2048, 12, 12, 12, 32000)


class Case(NamedTuple):
    """A model and its cache; ``verify``: the export compares artefact and eager model (slow for large caches)."""

    shape: tuple[int, ...] | None
    budget: int
    buffer: int = 128
    calibrated: bool = True
    verify: bool = True


CASES = {
    "tiny": Case(None, 128),
    "tiny-512": Case(None, 512),
    "tiny-10k": Case(None, 1152, calibrated=False),
    "110m": Case(_GROUPED, 256),
    "110m-100k": Case(_GROUPED, 1920, calibrated=False, verify=False),
    "110m-1m": Case(_MULTI_HEAD, 6784, calibrated=False, verify=False),
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
    # Long enough that the largest head finds as many positions.
    seen = engine.config.budget + max(64, 8 * engine.config.budget // engine.config.buffer) * engine.config.buffer
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


def calibration_of(case: Case, model: dict[str, Any], path: Path) -> Calibration:
    """Caps for policy ``global``, written to ``path``."""
    source = find_source(model["model"], random_weights=case.shape is not None)
    shape = source.shape()
    config = CacheConfig(case.budget, case.buffer, min(128, case.buffer), "global")
    loaded = load_model(source, "rg10")
    if case.calibrated:
        plan = None if case.shape is None else StreamPlan(4 * (case.budget + case.buffer), 4, 2)
        found = calibrate_sample(loaded, source, config, plan=plan, target=0.99 if case.shape is None else 0.9)
    else:
        found = made_up(shape.num_layers, shape.num_kv_heads, config, loaded)
    found.save(path)
    return found


def made_up(layers: int, heads: int, config: CacheConfig, loaded: LoadedModel) -> Calibration:
    """Uneven caps without a calibration: heads hold 0.2 to 5 times the mean, and a cap is a quarter above that."""
    share = np.random.default_rng(2).lognormal(0, 0.8, (layers, heads)).clip(0.2, 5)
    share[0, 0] = 5
    mean = share / share.mean() * config.budget
    caps = (np.ceil(1.25 * mean / 8) * 8).astype(int).tolist()
    sizes = np.zeros((layers, heads), int).tolist()
    return Calibration(
        schema_version=1,
        model="",
        weights_sha256="" if loaded.info.random_weights else loaded.info.weights_sha256,
        gates_sha256=loaded.gates.sha256,
        cache=replace(config, caps=tuple(map(tuple, caps))),
        dtype="float32",
        text="made up",
        tokens=0,
        held_out_tokens=0,
        target=1.0,
        agreement=0.0,
        occupancy=Occupancy(mean.tolist(), sizes, sizes),
        trade=[],
    )


def run_case(name: str, engines: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Exports both policies at equal bytes and measures them in every engine."""
    case = CASES[name]
    with model_folder(case.shape) as model, tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        caps_file = Path(work) / "caps.json"
        calibration = calibration_of(case, model, caps_file)
        if not case.verify:  # speed only; smaller caches of the same model are verified
            stack.enter_context(patch.object(pipeline, "verify_targets", lambda manifest, *_: manifest))
        shared = {**model, "buffer": case.buffer, "targets": tuple(engines)}
        pooled = stack.enter_context(exported(**shared, policy="global", budget=str(case.budget), caps=str(caps_file)))
        size = Artefact.load(pooled, verify=False).manifest.bytes.cache
        uniform = stack.enter_context(exported(**shared, policy="trimkv", budget=f"{size / 2**10 + 0.5:.3f}KB"))
        folders = {"global": pooled, "trimkv": uniform}
        mean = np.array(calibration.occupancy.mean)
        found = [measure(folders, engine, threads, rounds, mean) for engine in engines]
    caps = np.array(calibration.cache.caps)
    return {
        "case": name,
        "survivor_agreement": round(calibration.agreement, 5) if case.calibrated else None,
        "verified": case.verify,
        "caps_min_mean_max": [int(caps.min()), round(float(caps.mean()), 1), int(caps.max())],
        "engines": found,
    }


def main() -> None:
    options = parser("shared budget against a budget for each head, at equal bytes", "shared_budget")
    options.add_argument(
        "--cases", nargs="+", default=["tiny", "tiny-512", "110m"], choices=list(CASES), help="default: the small ones"
    )
    options.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--rounds", type=int, default=9, help="windows of B steps and an event, for each policy")
    args = options.parse_args()
    stored = json.loads(args.output.read_text())["results"] if args.output.is_file() else []
    results = [row for row in stored if row["case"] not in args.cases]
    for case in args.cases:
        results.append(run_case(case, args.engines, args.threads, args.rounds))
        print(json.dumps(results[-1], indent=1), flush=True)
    save(args.output, "shared_budget", results)


if __name__ == "__main__":
    main()
