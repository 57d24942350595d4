"""2,004 turns with tiny, in each engine: does a turn's time or the memory grow, and are facts recalled as at the start?

    python benchmarks/conversation.py

Turns go through ``trimkv_edge.runtime.conversation``, as in ``trimkv-chat``. A conversation is rounds, each like a
stream of the model card's table: eight new facts, two of them updated, text, then eight questions; later rounds have
other keys. Each round is also read alone, by a session that knows nothing of earlier ones: the difference is what those
cost. The machine's speed changes during a conversation, so a second engine reads the first and the last 100 texts too,
each right after the first engine: the last 100 are compared with the first 100 as multiples of its times. Last, short
rounds in a cache that holds everything, with new keys and with the same eight keys again: what the model cannot do with
any cache.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import ENGINES, exported, median, parser, rss, save

from trimkv_edge.evaluation.statistics import bootstrap, paired
from trimkv_edge.models.tiny.data import random_text
from trimkv_edge.models.tiny.words import KEYS, VALUES
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.engines import load_engine
from trimkv_edge.runtime.session import Session

FACTS, UPDATES = 8, 2
ROUNDS = len(KEYS) // FACTS
KINDS = ("state", "read", "ask")
# Holds all of the short conversations.
EVERYTHING = 2048
# Texts at each end of a conversation that are compared with each other.
ENDS = 100


@dataclass
class Talk:
    """One conversation.

    Attributes:
        reads: texts in all of it.
        other: a conversation of a second engine, which reads the first and last texts as well.
        said: values stated so far for each key, oldest first.
        seconds: of each turn, by its kind.
        right: answers of each round that are exactly right.
        verdicts: number of answers of each kind.
        against: seconds of each of those texts, divided by the second engine's.
    """

    chat: Conversation
    rng: random.Random
    reads: int = 0
    other: Conversation | None = None
    said: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    right: list[int] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    against: list[float] = field(default_factory=list)

    def turn(self, kind: str, text: str) -> str:
        """The answer to one message."""
        answer, seconds = timed(self.chat, text)
        self.seconds[kind].append(seconds)
        return answer

    def read(self, text: str) -> None:
        """A text, for the second engine too if it is one of the first or last."""
        message, place = f"Read this:\n{text}", len(self.seconds["read"])
        self.turn("read", message)
        if self.other is not None and not ENDS <= place < self.reads - ENDS:
            self.against.append(self.seconds["read"][-1] / timed(self.other, message)[1])

    def state(self, keys: list[str]) -> None:
        """States new values of keys."""
        facts = {key: self.rng.choice(VALUES) for key in keys}
        word = "Update" if keys[0] in self.said else "Remember"
        self.turn("state", f"{word}: " + "; ".join(f"the {key} is {value}" for key, value in facts.items()) + ".")
        for key, value in facts.items():
            self.said.setdefault(key, []).append(value)

    def round(self, keys: list[str], texts: list[str]) -> None:
        """Facts about ``keys``, ``texts`` to read, a question about each key."""
        size = 1 if keys[0] in self.said else 4  # updates change one fact, as in training
        for start in range(0, len(keys), size):
            self.state(keys[start : start + size])
        for key in self.rng.sample(keys, UPDATES):
            self.state([key])
        for text in texts:
            self.read(text)
        right = 0
        for key in self.rng.sample(keys, len(keys)):
            found = verdict(self.turn("ask", f"What is the {key}?"), key, self.said[key])
            self.verdicts[found] += 1
            right += found == "right"
        self.right.append(right)


def timed(chat: Conversation, message: str) -> tuple[str, float]:
    """The answer to a message, and the seconds it took."""
    started = time.perf_counter()
    answer = "".join(piece.text for piece in chat.ask(message, 12))
    return answer, time.perf_counter() - started


def verdict(answer: str, key: str, said: list[str]) -> str:
    """What an answer about ``key`` is: ``right`` (exactly the newest of the values ``said``), ``older`` (one of the
    earlier ones), ``other`` (another value, or another sentence about this one) or ``none`` (no value)."""
    if answer.strip() == f"The {key} is {said[-1]}.":
        return "right"
    value = answer.strip().rpartition(" is ")[2].removesuffix(".")
    if value in said[:-1]:
        return "older"
    return "other" if value in VALUES else "none"


def pieces(artefact: Artefact, rng: random.Random, count: int, length: int) -> list[str]:
    """Texts of ``length`` tokens each, from files that training never saw."""
    tokenizer, found = artefact.tokenizer, list[str]()
    assert tokenizer is not None
    while len(found) < count:
        text = tokenizer.decode(random_text(rng, length, held_out=True))
        if len(tokenizer.encode(text)) == length:
            found.append(text)
    return found


def rate(right: list[int]) -> dict[str, Any]:
    """Recall of rounds: mean, low and high end of its interval over them."""
    found = bootstrap(right, [FACTS] * len(right))
    return {"right": sum(right), "of": FACTS * len(right), "recall": _rounded(found.mean, found.low, found.high)}


def _rounded(*values: float) -> list[float]:
    return [round(value, 4) for value in values]


def keys_of_rounds(rng: random.Random, rounds: int) -> list[list[str]]:
    """Keys of each round, none of them twice."""
    names = rng.sample(KEYS, rounds * FACTS)
    return [names[start : start + FACTS] for start in range(0, len(names), FACTS)]


def long_talks(artefact: Artefact, name: str, args: Any) -> dict[str, Any]:
    """Conversations of all rounds, and each round alone."""
    engine = load_engine(artefact, name, args.threads)
    other = Conversation.open(artefact, Session.open(artefact, name, args.threads))
    for text in pieces(artefact, random.Random(f"warm {args.seed}"), ENDS, args.text):
        timed(other, f"Read this:\n{text}")
    talks, right, alone, growth = list[Talk](), list[int](), list[int](), list[int]()
    for number in range(args.talks):
        draw = random.Random(f"conversation {args.seed} {number}")
        rounds = [(keys, pieces(artefact, draw, args.reads, args.text)) for keys in keys_of_rounds(draw, ROUNDS)]
        seeds = [f"round {args.seed} {number} {at}" for at in range(ROUNDS)]
        # The note of the last one's tokens would count as growth.
        last = number == args.talks - 1
        session = Session.over(engine, artefact, note_tokens=last)
        chat = Conversation.open(artefact, session)
        for (keys, texts), seed in zip(rounds, seeds, strict=True):
            chat.reset()
            single = Talk(chat, random.Random(seed))
            single.round(keys, texts)
            alone += single.right
        chat.reset()
        talk, memory = Talk(chat, random.Random(), ROUNDS * args.reads, other), []
        for (keys, texts), seed in zip(rounds, seeds, strict=True):
            talk.rng = random.Random(seed)
            talk.round(keys, texts)
            memory.append(rss())
        talks.append(talk)
        right += talk.right
        growth += [] if last else [memory[-1] - memory[0]]
    thirds = np.split(np.array(right).reshape(args.talks, ROUNDS), 3, axis=1)
    difference = paired(right, alone, [FACTS] * len(right))
    return {
        "engine": name,
        "budget": engine.config.budget,
        "talks": args.talks,
        "turns": chat.turns,
        "tokens": engine.seen,
        "recall": rate(right),
        "first_middle_last_third": [rate(third.ravel().tolist()) for third in thirds],
        "each_round_alone": rate(alone),
        "difference": _rounded(difference.mean, difference.low, difference.high),
        "answers": dict(sum((talk.verdicts for talk in talks), Counter[str]())),
        "values_said": ROUNDS * (FACTS + UPDATES + FACTS),
        "most_values_held_by_a_head": most_values_held(session),
        "ms_per_turn": {
            kind: round(median(s for talk in talks for s in talk.seconds[kind]) * 1e3, 3) for kind in KINDS
        },
        "last_100_to_first_100": last_to_first(talks),
        "rss_growth_bytes": growth,
    }


def last_to_first(talks: list[Talk]) -> float:
    """Time of the last texts against that of the first ones, both as multiples of the second engine's."""
    first, last = (
        [ratio for talk in talks for ratio in talk.against[end]] for end in (slice(ENDS), slice(-ENDS, None))
    )
    return round(median(last) / median(first), 4)


def most_values_held(session: Session) -> int:
    """The most values, of statements and answers alike, that one head holds."""
    tokens, tokenizer = session.tokens, session.tokenizer
    assert tokens is not None
    assert tokenizer is not None
    is_value = np.array([tokenizer.decode([token]).strip() in VALUES for token in range(session.engine.vocab_size)])
    return int(is_value[tokens[session.engine.survivors()]].sum(-1).max())


def short_talks(artefact: Artefact, name: str, args: Any) -> dict[str, Any]:
    """Four rounds without text, nothing evicted: each with keys of its own, and all with the same ones."""
    session = Session.open(artefact, name, args.threads)
    chat = Conversation.open(artefact, session)
    found: dict[str, Any] = {"engine": name, "budget": session.engine.config.budget}
    for which in ("new_keys", "same_keys"):
        right, verdicts = [], Counter[str]()
        for number in range(4 * args.talks):
            chat.reset()
            talk = Talk(chat, random.Random(f"short {args.seed} {number}"))
            keys = keys_of_rounds(talk.rng, 4)
            for some in keys:
                talk.round(some if which == "new_keys" else keys[0], [])
            assert session.engine.seen < EVERYTHING
            right.append(talk.right)
            verdicts += talk.verdicts
        found[which] = {
            "by_round": [rate(list(those)) for those in zip(*right, strict=True)],
            "answers": dict(verdicts),
        }
    return found


def main() -> None:
    options = parser("a long conversation with tiny", "conversation")
    options.add_argument("--talks", type=int, default=3, help="conversations for each engine and budget")
    options.add_argument("--reads", type=int, default=155, help="pieces of text in each round")
    options.add_argument("--text", type=int, default=32, help="tokens of each piece")
    options.add_argument("--gates", nargs="+", default=["rg-chat", "rg"], help="gate sets of tiny, or files")
    options.add_argument("--budgets", nargs="+", default=["128", "512"])
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    # ExecuTorch's operators from torch use torch's threads, which wait long for each other beside other work.
    torch.set_num_threads(args.threads)
    results: dict[str, list[dict[str, Any]]] = {"long": [], "short": []}
    cases = [("long", gates, budget) for gates in args.gates for budget in args.budgets]
    # Nothing is evicted from the short ones, so the gates do not count.
    for kind, gates, budget in [*cases, ("short", args.gates[0], str(EVERYTHING))]:
        talks = long_talks if kind == "long" else short_talks
        with exported(budget=budget, buffer=32, prefill_chunk=32, gates=gates) as folder:
            artefact = Artefact.load(folder)
            for engine in ENGINES:
                results[kind].append({"gates": gates, **talks(artefact, engine, args)})
                print(results[kind][-1], flush=True)
    save(args.output, "conversation", results)


if __name__ == "__main__":
    main()
