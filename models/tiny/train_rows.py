"""Training rows for `tiny`'s gates: `python -m trimkv_edge.models.tiny.train_rows -o rows.jsonl` (see its README)."""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trimkv_edge.files import replace_durably
from trimkv_edge.models.tiny import data

Rows = Callable[[int, int, int, int], Iterator[dict[str, Any]]]
ANSWER_WEIGHT = 20.0
WEIGHTS = {data.ANSWER: ANSWER_WEIGHT, data.RANDOM: 0.0}


def gate_rows(seed: int, length: int, facts: int, longest: int) -> Iterator[dict[str, Any]]:
    """Dialogues with facts early, text in the middle and questions late, as ready rows of `trimkv-train`.

    Most rows skip a stretch of the text, log-uniform up to `longest` tokens: the facts are as old as in a stream of
    that length, and the capacity loss charges what the skipped text would still hold.
    """
    rng = random.Random(f"gates {seed}")
    while True:
        count = rng.randint(facts // 2, facts)
        dialogue = data.late_dialogue(rng, length, count, rng.randint(count // 2, count), rng.randint(0, 2))
        start, resume, end = dialogue.text
        gap = int(16 * (longest / 16) ** rng.random()) if rng.random() < 0.75 else 0
        yield {
            "input_ids": dialogue.ids,
            "index": [place + gap * (place >= resume) for place in range(length)],
            "weight": [WEIGHTS.get(kind, 1.0) for kind in dialogue.kinds],
            "skip": [start, end, resume, gap],
        }


def command(make: Rows, description: str | None, length: int, longest: int) -> None:
    """A command that writes rows of `make` as JSON lines; the file appears whole or not at all.

    Args:
        make: `(seed, length, facts, longest)` -> rows without end.
        length, longest: defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--longest", type=int, default=longest, help="longest skipped stretch, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make(args.seed, args.length, args.facts, args.longest)

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as out:
            for _ in tqdm(range(args.rows), unit="row"):
                out.write(json.dumps(next(rows)) + "\n")

    replace_durably(args.output, write)


def main() -> None:
    """Command line entry."""
    command(gate_rows, __doc__, 512, 100_000)


if __name__ == "__main__":
    main()
