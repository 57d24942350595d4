"""What eviction costs: the same artefact with and without its events, in alternating windows of one cycle.

    python benchmarks/eviction_overhead.py    # about 2 minutes

The one without never evicts: when the ring is full it starts over at slot M, a plain ring of equal size.
"""

from __future__ import annotations

import time

from common import ENGINES, exported, feed, median, open_engine, parser, save

from trimkv_edge.engine import Engine


def wrap(engine: Engine) -> None:
    """Forgets the ring without choosing survivors."""
    engine.live = engine.config.budget


def window(engine: Engine, evict: bool) -> tuple[float, float]:
    """Seconds of one cycle of B decode steps and of the event in it."""
    started = time.perf_counter()
    for _ in range(engine.room):
        engine.decode(11)
    steps = time.perf_counter()
    engine.evict() if evict else wrap(engine)
    ended = time.perf_counter()
    return ended - started, ended - steps


def main() -> None:
    options = parser("cost of eviction events on tiny", "eviction_overhead")
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--budgets", nargs="+", default=["128", "512"])
    args = options.parse_args()
    results = []
    for budget in args.budgets:
        with exported(budget=budget, buffer=128) as folder:
            for name in ENGINES:
                evicting, plain = (open_engine(folder, name, args.threads) for _ in range(2))
                feed(evicting, [11] * 2000)
                feed(plain, [11] * 2000, wrap)
                pairs = []
                for turn in range(args.rounds):
                    if turn % 2:
                        with_events, without = window(evicting, True), window(plain, False)
                    else:
                        without, with_events = window(plain, False), window(evicting, True)
                    pairs.append((with_events, without))
                result = {
                    "engine": name,
                    "budget": int(budget),
                    "buffer": 128,
                    "ms_per_token": round(median(a[0] for a, _ in pairs) / 128 * 1e3, 4),
                    "ms_per_event": round(median(a[1] for a, _ in pairs) * 1e3, 4),
                    "overhead": round(median(a[0] / b[0] for a, b in pairs) - 1, 4),
                }
                results.append(result)
                print(result, flush=True)
    save(args.output, "eviction_overhead", results)


if __name__ == "__main__":
    main()
