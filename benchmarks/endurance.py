"""A 100k-token stream: memory must not grow, a step must cost the same at its end as at its beginning, and the entries
that are left must be those of naive lists.

    python benchmarks/endurance.py                      # a budget for each head, about 10 minutes
    python benchmarks/endurance.py --policy global      # one budget for all

Decodes token by token. The two positions are compared by two engines side by side, in alternating windows of one
eviction cycle each, so that the machine's noise falls on both. The log-betas of all tokens are noted as they come; when
the stream has ended, the lists (``tests/oracle.py``) are run over them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from common import ENGINES, exported, median, open_engine, parser, rss, save

from trimkv_edge.engine import Engine, FloatArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracle import OracleCache


class Notes:
    """Log-betas of a stream, float32 ``[tokens, layers, kv_heads]``; all memory is taken at once."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.log_beta: FloatArray = np.ones((tokens, engine.num_layers, engine.num_kv_heads), np.float32)
        self.done = 0

    def take(self, engine: Engine) -> None:
        """What the engine read since the last call, which was no more than its ring holds."""
        state = engine.state()
        count = state.seen - self.done
        lengths = np.full(state.log_beta.shape[:2], state.live) if state.lengths is None else state.lengths
        slots = lengths[..., None] - count + np.arange(count)
        self.log_beta[self.done : state.seen] = np.take_along_axis(state.log_beta, slots, 2).transpose(2, 0, 1)
        self.done = state.seen


def decode_window(engine: Engine, token: int, count: int, notes: Notes | None = None) -> tuple[float, int]:
    """Seconds for ``count`` greedy steps with their events, and the next token."""
    started = time.perf_counter()
    for _ in range(count):
        token = int(engine.decode(token).argmax())
        if engine.room == 0:
            if notes:
                notes.take(engine)
            engine.evict()
    return time.perf_counter() - started, token


def differences(engine: Engine, notes: Notes) -> int:
    """Entries that only the engine or only the lists hold."""
    config = engine.config
    rows = (engine.num_layers, engine.num_kv_heads)
    oracle = OracleCache(
        *rows,
        config.budget,
        config.buffer,
        policy=config.policy,
        min_per_head=config.min_per_head,
        caps=config.caps,
    )
    for position in range(notes.done):
        for layer, head in np.ndindex(rows):
            oracle.append(layer, head, position, float(notes.log_beta[position, layer, head]))
        oracle.end_step(position + 1)
    held = engine.survivors()
    return sum(len(set(oracle.positions(*where)) ^ set(held[where][held[where] >= 0])) for where in np.ndindex(rows))


def main() -> None:
    options = parser("RSS slope, decode time and survivors over a long stream of tiny", "endurance")
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--early", type=int, default=2_000)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--budget", default="128")
    options.add_argument("--policy", default="trimkv", help="others keep their stored results")
    args = options.parse_args()
    results = json.loads(args.output.read_text())["results"] if args.output.is_file() else {}
    with exported(budget=args.budget, buffer=128, policy=args.policy) as folder:
        for name in ENGINES:
            late, early = (open_engine(folder, name, args.threads) for _ in range(2))
            notes = Notes(late, args.tokens + 2 * 1000)
            token, samples = 7, []
            started = time.perf_counter()
            while late.seen < args.tokens:
                _, token = decode_window(late, token, 1000, notes)
                samples.append((late.seen, rss()))
            wall = time.perf_counter() - started
            notes.take(late)
            wrong, seen, entries = differences(late, notes), late.seen, late.entries
            warm = [memory for seen, memory in samples if seen >= 5_000]
            # The same stream: where heads share a budget, time follows how it is spread over them.
            _, other = decode_window(early, 7, args.early)
            times: dict[str, list[float]] = {"early": [], "late": []}
            for _ in range(args.rounds):
                seconds, other = decode_window(early, other, 128)
                times["early"].append(seconds)
                seconds, token = decode_window(late, token, 128)
                times["late"].append(seconds)
            ratio = median(b / a for a, b in zip(times["early"], times["late"], strict=True))
            results[name if args.policy == "trimkv" else f"{name} {args.policy}"] = {
                "tokens": seen,
                "entries_at_the_end": entries,
                "survivors_that_differ_from_lists": wrong,
                "tokens_per_second": round(args.tokens / wall, 1),
                "rss_growth_bytes_after_5k": max(warm) - warm[0],
                "ms_per_token_early": round(median(times["early"]) / 128 * 1e3, 4),
                "ms_per_token_late": round(median(times["late"]) / 128 * 1e3, 4),
                "late_to_early": round(ratio, 4),
            }
            print(name, results[name if args.policy == "trimkv" else f"{name} {args.policy}"], flush=True)
    save(args.output, "endurance", results)


if __name__ == "__main__":
    main()
