"""A 100k-token stream: memory must not grow, and a step must cost the same at its end as at its beginning.

    python benchmarks/endurance.py            # about 10 minutes

Decodes token by token. The two positions are compared by two engines side by side, in alternating windows of one
eviction cycle each, so that the machine's noise falls on both.
"""

from __future__ import annotations

import time

from common import ENGINES, exported, feed, median, open_engine, parser, rss, save

from trimkv_edge.engine import Engine


def decode_window(engine: Engine, token: int, count: int) -> tuple[float, int]:
    """Seconds for ``count`` greedy steps with their events, and the next token."""
    started = time.perf_counter()
    for _ in range(count):
        token = int(engine.decode(token).argmax())
        if engine.room == 0:
            engine.evict()
    return time.perf_counter() - started, token


def main() -> None:
    options = parser("RSS slope and decode time over a long stream of tiny", "endurance")
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--early", type=int, default=2_000)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--budget", default="128")
    args = options.parse_args()
    results = {}
    with exported(budget=args.budget, buffer=128) as folder:
        for name in ENGINES:
            late, early = (open_engine(folder, name, args.threads) for _ in range(2))
            token, samples = 7, []
            started = time.perf_counter()
            while late.seen < args.tokens:
                _, token = decode_window(late, token, 1000)
                samples.append((late.seen, rss()))
            wall = time.perf_counter() - started
            warm = [memory for seen, memory in samples if seen >= 5_000]
            feed(early, [7] * args.early)
            times: dict[str, list[float]] = {"early": [], "late": []}
            other = token
            for _ in range(args.rounds):
                seconds, other = decode_window(early, other, 128)
                times["early"].append(seconds)
                seconds, token = decode_window(late, token, 128)
                times["late"].append(seconds)
            ratio = median(b / a for a, b in zip(times["early"], times["late"], strict=True))
            results[name] = {
                "tokens": late.seen,
                "events": (late.seen - late.live) // late.config.buffer,
                "tokens_per_second": round(args.tokens / wall, 1),
                "rss_growth_bytes_after_5k": max(warm) - warm[0],
                "ms_per_token_early": round(median(times["early"]) / 128 * 1e3, 4),
                "ms_per_token_late": round(median(times["late"]) / 128 * 1e3, 4),
                "late_to_early": round(ratio, 4),
            }
            print(name, results[name], flush=True)
    save(args.output, "endurance", results)


if __name__ == "__main__":
    main()
