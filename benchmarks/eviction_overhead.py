"""What eviction costs: the same engine with and without its events, in alternating windows of one cycle.

    python benchmarks/eviction_overhead.py    # about 2 minutes

The one without never evicts: when the ring is full it starts over at slot M, a plain ring of equal size. Both let the
gates read the tokens of a cycle, which counts as decoding.
"""

from __future__ import annotations

import random
import time

from common import ENGINES, exported, feed, median, open_engine, parser, save

from trimkv_edge.runtime.engines.base import ArtefactEngine


def wrap(engine: ArtefactEngine) -> None:
    """Forgets the ring without choosing survivors."""
    engine.live = engine.config.budget


def window(engine: ArtefactEngine, tokens: list[int], evict: bool) -> tuple[float, float, float]:
    """Seconds of one cycle of B decode steps and the event that ends it, of the event alone, and of the gates."""
    started = time.perf_counter()
    for token in tokens:
        engine.decode(token)
    steps = time.perf_counter()
    engine.settle()
    gates = time.perf_counter()
    engine.evict() if evict else wrap(engine)
    ended = time.perf_counter()
    return ended - started, ended - gates, gates - steps


Times = tuple[float, float, float]


def measure(engine: ArtefactEngine, rounds: int) -> list[tuple[Times, Times]]:
    """Pairs of windows over the same tokens from the same state in the same engine.

    Step times depend on the data, and by some per cent on where an engine's buffers lie in memory.
    """
    rng = random.Random(0)
    buffer = engine.config.buffer
    feed(engine, rng.choices(range(engine.vocab_size), k=engine.config.budget + 15 * buffer))
    pairs = []
    state = engine.state()
    for turn in range(rounds):
        tokens = rng.choices(range(engine.vocab_size), k=buffer)
        times = {}
        for evict in (True, False) if turn % 2 else (False, True):
            engine.load_state(state)
            times[evict] = window(engine, tokens, evict)
            if evict:
                following = engine.state()
        pairs.append((times[True], times[False]))
        state = following
    return pairs


def main() -> None:
    options = parser("cost of eviction events on tiny", "eviction_overhead")
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--budgets", nargs="+", default=["128", "512"])
    args = options.parse_args()
    results = []
    for budget in args.budgets:
        with exported(budget=budget, buffer=128) as folder:
            for name in ENGINES:
                pairs = measure(open_engine(folder, name, args.threads), args.rounds)
                result = {
                    "engine": name,
                    "budget": int(budget),
                    "buffer": 128,
                    "ms_per_token": round(median(a[0] for a, _ in pairs) / 128 * 1e3, 4),
                    "ms_per_event": round(median(a[1] for a, _ in pairs) * 1e3, 4),
                    "ms_of_gates": round(median(a[2] for a, _ in pairs) * 1e3, 4),
                    "overhead": round(median(a[0] / b[0] for a, b in pairs) - 1, 4),
                }
                results.append(result)
                print(result, flush=True)
    save(args.output, "eviction_overhead", results)


if __name__ == "__main__":
    main()
