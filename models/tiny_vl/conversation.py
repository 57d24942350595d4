"""A long conversation with pictures through the bounded cache: `python -m trimkv_edge.models.tiny_vl.conversation`.

The model gives every answer itself, token by token, and the stream goes on with what it said.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray
from trimkv_edge.models.tiny_vl import data
from trimkv_edge.models.tiny_vl.corpus import random_text
from trimkv_edge.models.tiny_vl.evaluate import BUFFER, GATES, SINKS, load
from trimkv_edge.models.tiny_vl.patches import cut_many
from trimkv_edge.models.tiny_vl.tokenizer import IMAGE_PAD, VISION_END, VISION_START, load_tokenizer
from trimkv_edge.models.vision_engine import VisionEngine, vision_engine

LONGEST_ANSWER = 12
NOTED = "<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>\n"
QUESTIONS = ("picture question", "text question")


def feed(engine: VisionEngine, ids: list[int]) -> FloatArray:
    """Reads tokens, with an event whenever the cache is full; the logits after the last."""
    while True:
        if engine.room == 0:
            engine.evict()
        step = min(engine.room, engine.config.prefill_chunk, len(ids))
        logits = engine.prefill(ids[:step])
        ids = ids[step:]
        if not ids:
            return logits


def answer(engine: VisionEngine, asked: str) -> str:
    """The model's reply to a question, greedy, at most 12 tokens."""
    tokenizer = load_tokenizer()
    logits = feed(engine, tokenizer.encode(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n").ids)
    said: list[int] = []
    end = tokenizer.token_to_id("<|im_end|>")
    while len(said) < LONGEST_ANSWER and (not said or said[-1] != end):
        said.append(int(logits.argmax()))
        logits = feed(engine, said[-1:])
    feed(engine, tokenizer.encode("\n").ids)
    return tokenizer.decode(said, skip_special_tokens=True)


def converse(engine: VisionEngine, seed: int, pictures: int, text: int) -> Iterator[tuple[str, bool]]:
    """Rounds of four pictures, four facts, each followed by `text` tokens of held-out text, and eight questions.

    Yields, until `pictures` were shown and their round ended, the kind of each turn, and whether its answer was right.
    """
    rng = random.Random(f"conversation {seed}")
    encode, shown = load_tokenizer().encode, 0
    for turn in data.rounds(seed, pictures=4, facts=4, questions=8):
        if turn.kind in QUESTIONS:
            yield turn.kind, answer(engine, turn.text) == turn.reply
            continue
        if shown >= pictures and turn.kind == "picture":
            return
        said = f"<|im_start|>user\n{turn.text}"
        if turn.image is not None:
            patches, down, across = cut_many(np.array(turn.image)[None, None])
            (picture,) = engine.encode("image", patches[0].numpy(), np.array([[1, down, across]]))
            engine.show([picture])
            said += VISION_START + IMAGE_PAD * picture.rows + VISION_END
            shown += 1
        feed(engine, encode(said + NOTED).ids)
        if text:
            feed(engine, encode("<|im_start|>user\nRead this:\n").ids + random_text(rng, text, held_out=True))
            feed(engine, encode(NOTED).ids)
        yield turn.kind, True


def run(engine: VisionEngine, seed: int, pictures: int, text: int, parts: int = 4) -> dict[str, Any]:
    """Tokens read, the most entries held after a turn, and right answers of each kind, also in `parts` of the talk."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS}
    most = 0
    for kind, good in converse(engine, seed, pictures, text):
        most = max(most, engine.entries)
        if kind in right:
            right[kind].append(good)
    out: dict[str, Any] = {"tokens": engine.seen, "most_entries": most}
    for kind, answers in right.items():
        size = -(-len(answers) // parts)
        out[kind] = {
            "asked": len(answers),
            "right": sum(answers),
            "by_part": [round(sum(part) / len(part), 3) for n in range(parts) if (part := answers[n * size :][:size])],
        }
    return out


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--text", type=int, default=40, help="tokens of text after each picture and fact")
    parser.add_argument("--full", type=int, default=0, help="also a cache that holds so many tokens: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [(name, CacheConfig(budget, BUFFER, BUFFER, "global")) for name in args.gates for budget in args.budgets]
    settings += [("", CacheConfig(budget, BUFFER, BUFFER, "streaming", sinks=SINKS)) for budget in args.budgets]
    if args.full:
        settings.append(("", CacheConfig(args.full, 128, 128, "full")))
    records = []
    for name, config in settings:
        result = run(vision_engine(load(name or GATES[0]), config), args.seed, args.pictures, args.text)
        records.append({"gates": name, "policy": config.policy, "budget": config.budget, **result})
        print(json.dumps(records[-1]), flush=True)
    if args.output:
        kept = {"seed": args.seed, "pictures": args.pictures, "text": args.text, "table": records}
        args.output.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
