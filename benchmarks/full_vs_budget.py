"""A full cache against budgets, through exported artefacts: recall accuracy, bytes, tokens per second, in one table.

    python benchmarks/full_vs_budget.py       # about 10 minutes

Dialogues of tiny's held-out kind (``models/tiny/data.py``): facts first, one long real text, questions last. An answer
token counts when it is the greedy one, given what came before. "Full" is the same artefact with a
budget that the whole dialogue fits into.
"""

from __future__ import annotations

import random
import time
from typing import Any

from common import ENGINES, exported, feed, median, open_engine, parser, save

from trimkv_edge.engine import Engine
from trimkv_edge.manifest import load_manifest
from trimkv_edge.models.tiny.data import ANSWER, Dialogue, late_dialogue


def answered(engine: Engine, dialogue: Dialogue) -> tuple[int, int]:
    """(answer tokens right, answer tokens asked)."""
    engine.reset()
    right, asked, read = 0, 0, 0
    ids, kinds = dialogue.ids, dialogue.kinds
    for at in [i for i, kind in enumerate(kinds) if kind == ANSWER]:
        feed(engine, ids[read : at - 1])
        guess = int(engine.decode(ids[at - 1]).argmax())
        if engine.room == 0:
            engine.evict()
        read = at
        right, asked = right + int(guess == ids[at]), asked + 1
    return right, asked


def decode_speed(engine: Engine, cycles: int = 5) -> float:
    """Tokens per second of greedy steps with their events, where the stream stands."""
    rates = []
    for _ in range(cycles):
        started = time.perf_counter()
        for _ in range(128):
            engine.decode(11)
            if engine.room == 0:
                engine.evict()
        rates.append(128 / (time.perf_counter() - started))
    return median(rates)


def main() -> None:
    options = parser("full cache against budgets on tiny", "full_vs_budget")
    options.add_argument("--length", type=int, default=4096)
    options.add_argument("--dialogues", type=int, default=24)
    options.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 128])
    options.add_argument("--gates", nargs="+", default=["rg", "rg10"])
    args = options.parse_args()
    rng = random.Random(20261124)
    dialogues = [
        late_dialogue(rng, args.length, facts=8, questions=8, updates=2, held_out=True) for _ in range(args.dialogues)
    ]
    rows: list[dict[str, Any]] = []
    for gates in args.gates:
        for budget in [*args.budgets, args.length]:
            with exported(budget=str(budget), buffer=32, prefill_chunk=32, gates=gates) as folder:
                for name in ENGINES:
                    engine = open_engine(folder, name, args.threads)
                    right, asked = (sum(x) for x in zip(*(answered(engine, d) for d in dialogues), strict=True))
                    row = {
                        "gates": gates,
                        "engine": name,
                        "budget": "full" if budget == args.length else budget,
                        "accuracy": round(right / asked, 4),
                        "answer_tokens": asked,
                        "cache_bytes": load_manifest(folder, verify_files=False).bytes.cache,
                        "tokens_per_second": round(decode_speed(engine), 1),
                    }
                    rows.append(row)
                    print(row, flush=True)
    save(args.output, "full_vs_budget", rows)


if __name__ == "__main__":
    main()
