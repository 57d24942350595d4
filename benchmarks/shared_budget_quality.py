"""One budget for all heads against a budget for each, at equal physical bytes: answers and text of `tiny`.

    python benchmarks/shared_budget_quality.py             # about 25 minutes on two cores

For each budget M the caps of policy `global` (`rg10` gates) are calibrated; the policies with a budget for each head
(`trimkv`) and for each layer's heads then get as many entries as fit into the bytes of that static cache. All read the
same streams. Differences are paired, with 95 % bootstrap intervals over streams. Run in the eager engine with the
artefact's caps, which exports are verified against.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from common import RESULTS, parser, save

from trimkv_edge.budget import ModelShape, cache_bytes
from trimkv_edge.calibration.calibrate import calibrate_sample
from trimkv_edge.calibration.heatmap import draw_heat_map
from trimkv_edge.config import CacheConfig
from trimkv_edge.evaluation.reader import EagerReader
from trimkv_edge.evaluation.samples import Sample, SampleWriter
from trimkv_edge.evaluation.statistics import bootstrap, paired
from trimkv_edge.evaluation.tasks import TASKS
from trimkv_edge.evaluation.words import WORDS
from trimkv_edge.models.loading import LoadedModel, load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.models.tiny.corpus import stdlib_texts

QUESTIONS = ("multi-query", "multi-key", "updates", "dialogue")
Totals = tuple[np.ndarray, np.ndarray]


def most_entries(shape: ModelShape, config: CacheConfig, limit: int) -> int:
    """The largest budget for each head whose cache is no larger than ``limit`` bytes."""
    budget = config.budget
    while cache_bytes(shape, replace(config, budget=budget + 1), "float32") <= limit:
        budget += 1
    return budget


def score(loaded: LoadedModel, config: CacheConfig, samples: dict[str, list[Sample]]) -> dict[str, Totals]:
    """Per kind (questions, text): sums and counts of each stream."""
    found: dict[str, Totals] = {}
    for kind, tasks in (("questions", QUESTIONS), ("text", ("text",))):
        results = [pair for task in tasks for pair in EagerReader(loaded.model, config, 16).score(samples[task])]
        values = [hit if kind == "questions" else nats for hit, nats in results]
        found[kind] = np.array([v.sum() for v in values], float), np.array([v.size for v in values], float)
    return found


def describe(interval: Any) -> list[float]:
    return [round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def main() -> None:
    options = parser("answers and text of tiny, shared budgets against budgets for each head", "shared_budget_quality")
    options.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128])
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    options.add_argument("--buffer", type=int, default=32)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--floor", type=float, default=0.25, help="share of the budget that each head may always keep")
    args = options.parse_args()
    source = find_source("tiny")
    assert source.folder is not None
    shape = source.shape()
    gates = {kind: load_model(source, kind) for kind in ("rg10", "rg")}
    writer = SampleWriter(source.folder, WORDS, list(stdlib_texts(held_out=True)))
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        tasks = (*QUESTIONS, "text")
        samples = {task: [TASKS[task].sample(writer, length, 0, i) for i in range(args.samples)] for task in tasks}
        for budget in args.budgets:
            floor = round(args.floor * budget)
            shared = CacheConfig(budget, args.buffer, min(args.buffer, budget), "global", min_per_head=floor)
            calibration = calibrate_sample(gates["rg10"], source, shared)
            if length == args.lengths[0] and budget == max(args.budgets):
                draw_heat_map(calibration, RESULTS / "shared_budget_quality.png")
            size = cache_bytes(shape, calibration.cache, "float32")
            plain = replace(shared, policy="trimkv", min_per_head=0)
            each = replace(plain, budget=most_entries(shape, plain, size))
            methods = {
                "global rg10": (gates["rg10"], calibration.cache),
                "trimkv rg10": (gates["rg10"], each),
                "trimkv rg": (gates["rg"], each),
            }
            found = {name: score(*how, samples) for name, how in methods.items()}
            first = found["global rg10"]
            for name, (_, config) in methods.items():
                row: dict[str, Any] = {
                    "length": length,
                    "method": name,
                    "budget": config.budget,
                    "min_per_head": config.min_per_head,
                    "cache_bytes": cache_bytes(shape, config, "float32"),
                }
                for kind, (totals, counts) in found[name].items():
                    row[kind] = describe(bootstrap(totals, counts))
                    if name != "global rg10":
                        row[f"{kind}_global_minus_this"] = describe(paired(first[kind][0], totals, counts))
                if name == "global rg10":
                    row["agreement"] = round(calibration.agreement, 5)
                rows.append(row)
                print(row, flush=True)
    save(args.output, "shared_budget_quality", rows)


if __name__ == "__main__":
    main()
