"""2,000 turns with tiny, in each engine: does a turn's time or the memory grow, and are facts recalled?

    python benchmarks/conversation.py      # about 5 minutes

Turns go through ``trimkv_edge.runtime.conversation``, as in ``trimkv-chat``: a fact is stated, a piece of the standard
library is read, a fact of the last ``--reach`` turns is asked for, and again. An answer is right if it holds the newest
value that was stated.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import Any

from common import ENGINES, exported, median, parser, rss, save

from trimkv_edge.models.tiny.data import new_facts, random_text
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session


def talk(artefact: Artefact, engine: str, args: Any) -> dict[str, Any]:
    """One conversation."""
    rng = random.Random(args.seed)
    session = Session.open(artefact, engine, args.threads)
    chat = Conversation.open(artefact, session)
    assert artefact.tokenizer is not None
    facts: OrderedDict[str, tuple[str, int]] = OrderedDict()
    seconds: dict[str, list[float]] = {"state": [], "read": [], "ask": []}
    memory, asked, ever = [], [], set[str]()

    def turn(kind: str, text: str) -> str:
        started = time.perf_counter()
        answer = "".join(piece.text for piece in chat.ask(text, 12))
        seconds[kind].append(time.perf_counter() - started)
        return answer

    for number in range(0, args.turns, 3):
        (key, value), *_ = new_facts(rng, 1, {name: value for name, (value, _) in facts.items()}).items()
        if facts and rng.random() < args.updates:
            key = rng.choice(list(facts))
        word = "Update" if key in ever else "Remember"
        ever.add(key)
        facts[key] = (value, session.engine.seen)
        facts.move_to_end(key)
        while len(facts) > args.reach // 3:
            facts.popitem(last=False)
        turn("state", f"{word}: the {key} is {value}.")
        piece = artefact.tokenizer.decode(random_text(rng, args.text, held_out=True))
        turn("read", f"Read this:\n{piece}")
        key = rng.choice(list(facts))
        value, stated = facts[key]
        distance = session.engine.seen - stated
        asked.append((distance, value in turn("ask", f"What is the {key}?").split(" is ")[-1]))
        if number % 30 == 0:
            memory.append(rss())
    grown = {kind: median(times[-100:]) / median(times[:100]) for kind, times in seconds.items()}
    far = [right for distance, right in asked if distance > 4 * session.engine.config.slots]
    return {
        "engine": engine,
        "turns": chat.turns,
        "tokens": session.engine.seen,
        "recall": round(sum(right for _, right in asked) / len(asked), 4),
        "questions": len(asked),
        "recall_beyond_4_caches": round(sum(far) / len(far), 4) if far else None,
        "questions_beyond_4_caches": len(far),
        "ms_per_turn": {kind: round(median(times) * 1e3, 3) for kind, times in seconds.items()},
        "last_100_to_first_100": {kind: round(ratio, 4) for kind, ratio in grown.items()},
        "rss_growth_bytes": memory[-1] - memory[len(memory) // 10],
    }


def main() -> None:
    options = parser("a long conversation with tiny", "conversation")
    options.add_argument("--turns", type=int, default=2001)
    options.add_argument("--text", type=int, default=64, help="tokens of each piece of text")
    options.add_argument("--reach", type=int, default=24, help="turns back that a question may go")
    options.add_argument("--updates", type=float, default=0.25, help="share of statements that change a fact")
    options.add_argument("--budget", default="128")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    results = []
    with exported(budget=args.budget, buffer=32, prefill_chunk=32, gates="rg") as folder:
        artefact = Artefact.load(folder)
        for engine in ENGINES:
            results.append(talk(artefact, engine, args))
            print(results[-1], flush=True)
    save(args.output, "conversation", results)


if __name__ == "__main__":
    main()
