"""A long real conversation for demonstrations: facts first, then tens of thousands of tokens of text, then questions.

`python -m trimkv_edge.models.tiny.demo --tokens 20000` reads it in bounded memory and prints the answers.
"""

import argparse
import random
import time
from dataclasses import dataclass

import torch

from trimkv_edge.config import CacheConfig
from trimkv_edge.models.tiny import bounded, data
from trimkv_edge.models.tiny.tokenizer import load_tokenizer
from trimkv_edge.models.tiny.words import VALUES

END = "<|im_end|>\n"


@dataclass(frozen=True)
class Demo:
    """Attributes:
    text: the conversation up to the first question, special tokens included.
    questions: each ends where the assistant has to speak; feed one, generate up to `<|im_end|>`, feed `END`, and so on.
    answers: what the assistant has to say to each question.
    """

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def demo_text(num_tokens: int, facts: int = 6, seed: int = 0) -> Demo:
    """A conversation whose `text` has at least `num_tokens` tokens; the facts are within its first 150.

    Args:
        num_tokens: least length of the text.
        facts: facts stated; the first of them is then updated, and only its new value is right.
        seed: chooses facts and pieces of text.
    """
    rng = random.Random(f"demo {seed}")
    dialogue = data.Dialogue()
    stated = data.new_facts(rng, facts)
    names = list(stated)
    for start in range(0, facts, 4):
        dialogue.state({key: stated[key] for key in names[start : start + 4]})
    fresh = [value for value in VALUES if value not in stated.values()]
    dialogue.state({names[0]: rng.choice(fresh)}, update=True)
    dialogue.read(data.random_text(rng, num_tokens, held_out=True))
    questions = tuple(f"<|im_start|>user\nWhat is the {key}?{END}<|im_start|>assistant\n" for key in names)
    answers = tuple(f"The {key} is {dialogue.facts[key]}." for key in names)
    return Demo(load_tokenizer().decode(dialogue.ids, skip_special_tokens=False), questions, answers)


def main() -> None:
    """Command line entry."""
    from trimkv_edge.models.tiny.evaluate import GATES, load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--gates", choices=GATES, default="rg")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer, demo = load(args.gates), load_tokenizer(), demo_text(args.tokens, seed=args.seed)
    cache = bounded.make_cache(model, CacheConfig(args.budget, 32, 32), rows=1)

    def feed(text: str) -> int:
        """Reads a text and returns the most likely next token."""
        token = -1
        for logits in bounded.read(model, cache, torch.tensor([tokenizer.encode(text).ids])):
            token = int(logits[0, -1].argmax())
        return token

    began = time.time()
    feed(demo.text)
    print(f"read {cache.seen} tokens in {time.time() - began:.1f} s; {cache.live} entries held per head")
    for question, expected in zip(demo.questions, demo.answers, strict=True):
        token, said = feed(question), ""
        while token != tokenizer.token_to_id("<|im_end|>") and len(said) < 80:
            piece = tokenizer.decode([token])
            said += piece
            token = feed(piece)
        feed(END)
        print(f"{'right' if said == expected else 'WRONG'}  {said!r}  (expected {expected!r})")


if __name__ == "__main__":
    main()
