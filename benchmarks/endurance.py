"""A 100k-token stream: memory must not grow, a step must cost the same at its end as at its beginning, and the entries
that are left must be those of naive lists.

    python benchmarks/endurance.py                      # a budget for each head, about 3 minutes
    python benchmarks/endurance.py --policy global      # one budget for all

Decodes token by token. The two positions are compared by two engines side by side, in alternating windows of one
eviction cycle each, so that the machine's noise falls on both. Where their memory lies makes some per cent between two
equal engines; so they are compared twice, first both early and then one of them late, and the second ratio is divided
by the first. The log-betas of all tokens are noted as they come; when the stream has ended, the lists
(``tests/oracle.py``) are run over them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from common import ENGINES, exported, median, open_engine, parser, rss, save

from trimkv_edge.engine import Engine, FloatArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracle import OracleCache

CYCLE = 128


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


class Stream:
    """One engine, and the token that it reads next."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.token = engine, 7

    def begin(self, count: int) -> None:
        """Back to an empty cache, and ``count`` tokens on."""
        self.engine.reset()
        self.token = 7
        self.decode(count)

    def decode(self, count: int, notes: Notes | None = None) -> float:
        """Seconds for ``count`` greedy steps with their events."""
        started = time.perf_counter()
        for _ in range(count):
            self.token = int(self.engine.decode(self.token).argmax())
            if self.engine.room == 0:
                if notes:
                    notes.take(self.engine)
                self.engine.evict()
        return time.perf_counter() - started


def side_by_side(first: Stream, second: Stream, rounds: int) -> tuple[float, float, float]:
    """Median ms per token of each, and the median of the second's time to the first's within a round."""
    times = []
    for turn in range(rounds):
        pair = {}
        for stream in (first, second) if turn % 2 else (second, first):
            pair[stream] = stream.decode(CYCLE)
        times.append((pair[first], pair[second]))
    one, other = (median(seconds) / CYCLE * 1e3 for seconds in zip(*times, strict=True))
    return one, other, median(b / a for a, b in times)


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


def measure(folder: Path, name: str, args: argparse.Namespace) -> dict[str, int | float]:
    """The stream of one engine, and how its steps compare with an early one's."""
    early, late = (Stream(open_engine(folder, name, args.threads)) for _ in range(2))
    early.begin(args.early)
    late.begin(args.early)
    *_, equal = side_by_side(early, late, args.rounds)
    late.begin(0)
    notes = Notes(late.engine, args.tokens + 1000)
    samples: list[int] = []
    started = time.perf_counter()
    while late.engine.seen < args.tokens:
        late.decode(1000, notes)
        samples.append(rss())
    wall = time.perf_counter() - started
    notes.take(late.engine)
    row = {
        "tokens": late.engine.seen,
        "entries_at_the_end": late.engine.entries,
        "survivors_that_differ_from_lists": differences(late.engine, notes),
        "tokens_per_second": round(args.tokens / wall, 1),
        "rss_growth_bytes_after_5k": max(samples[5:]) - samples[5],
        "rss_growth_bytes_second_half": max(samples[len(samples) // 2 :]) - samples[len(samples) // 2],
    }
    early.begin(args.early)
    ms_early, ms_late, apart = side_by_side(early, late, args.rounds)
    return row | {
        "ms_per_token_early": round(ms_early, 4),
        "ms_per_token_late": round(ms_late, 4),
        "ratio_when_both_were_early": round(equal, 4),
        "late_to_early": round(apart / equal, 4),
    }


def main() -> None:
    options = parser("RSS slope, decode time and survivors over a long stream of tiny", "endurance")
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--early", type=int, default=2_000)
    options.add_argument("--rounds", type=int, default=120, help="pairs of windows")
    options.add_argument("--budget", default="128")
    options.add_argument("--policy", default="trimkv", help="others keep their stored results")
    args = options.parse_args()
    results = json.loads(args.output.read_text())["results"] if args.output.is_file() else {}
    with exported(budget=args.budget, buffer=CYCLE, policy=args.policy) as folder:
        for name in ENGINES:
            row = measure(folder, name, args)
            results[name if args.policy == "trimkv" else f"{name} {args.policy}"] = row
            print(name, row, flush=True)
    save(args.output, "endurance", results)


if __name__ == "__main__":
    main()
