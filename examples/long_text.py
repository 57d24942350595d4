"""Exports the shipped model, lets it read a long real text in a fixed amount of memory, and asks about the beginning.

The text is a conversation that states a few facts, updates one, and then quotes tens of thousands of tokens of this
Python installation's standard library. The questions come last. Both engines answer them from a cache that never held
more than ``budget + buffer`` entries per head.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.budget import ModelShape, format_bytes, full_cache_bytes
from trimkv_edge.cli.common import quiet_libraries, run_cli
from trimkv_edge.cli.export import main as trimkv_export
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.statistics import rss_bytes

if TYPE_CHECKING:
    from trimkv_edge.models.tiny.demo import Demo


def read(session: Session, tokens: list[int], name: str) -> list[tuple[int, int]]:
    """Feeds the text; returns (tokens read, resident bytes) at each tenth."""
    samples: list[tuple[int, int]] = []
    with tqdm(total=len(tokens), desc=f"{name:<10}", unit="tok", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)
            if done * 10 >= total * (len(samples) + 1):
                samples.append((done, rss_bytes()))

        session.feed(tokens, progress)
    return samples


def ask(session: Session, artefact: Artefact, demo: Demo) -> int:
    """Puts the questions, prints the answers; returns how many are right."""
    assert artefact.tokenizer is not None
    assert artefact.manifest.tokenizer is not None
    stop = artefact.manifest.tokenizer.eos_token_ids
    right, before = 0, ""
    for question, expected in zip(demo.questions, demo.answers, strict=True):
        session.feed(artefact.tokenizer.encode(before + question))
        said = "".join(piece.text for piece in session.generate(24, stop_ids=stop))
        right += said == expected
        asked = question.split("\n")[1].removesuffix("<|im_end|>")
        print(f"  {asked:<28} {said:<32} {'right' if said == expected else f'wrong: {expected}'}")
        before = "\n"  # the end-of-message token is pending and is read first
    return right


def describe(artefact: Artefact, samples: list[tuple[int, int]]) -> None:
    """Memory over the text, and what an ordinary cache would hold at its end."""
    manifest = artefact.manifest
    model = manifest.model
    shape = ModelShape(
        model.num_layers,
        model.hidden_size,
        0,
        model.num_attention_heads,
        model.num_kv_heads,
        model.head_dim,
        model.vocab_size,
        model.parameters,
    )
    print("  tokens read " + "".join(f"{done / 1000:>8.0f}k" for done, _ in samples[::3]))
    print("  process     " + "".join(f"{memory / 2**20:>5.0f} MiB" for _, memory in samples[::3]))
    full = full_cache_bytes(shape, samples[-1][0], manifest.dtype)
    print(f"  the cache   {format_bytes(manifest.bytes.cache)}; an ordinary one would be {format_bytes(full)} by now")


def run(args: argparse.Namespace) -> None:
    """The demonstration."""
    quiet_libraries()
    from trimkv_edge.models.tiny.demo import demo_text

    if not (args.artefact / "manifest.json").is_file():
        trimkv_export(
            ["--model", "tiny", "--budget", str(args.budget), "--gates", args.gates, "-o", str(args.artefact)]
        )
    artefact = Artefact.load(args.artefact)
    assert artefact.tokenizer is not None
    demo = demo_text(args.tokens)
    tokens = artefact.tokenizer.encode(demo.text)
    cache = artefact.manifest.cache
    print(f"\nreading {len(tokens)} tokens with {cache.budget} kept + {cache.buffer} new entries per head")
    wrong = 0
    for name in artefact.manifest.targets:
        session = Session.open(artefact, name)
        samples = read(session, tokens, name)
        statistics = session.statistics()
        print(f"\n{name}: {statistics.prefill_tokens_per_s:.0f} tokens/s, {statistics.events} eviction events")
        describe(artefact, samples)
        wrong += len(demo.questions) - ask(session, artefact, demo)
    print(f"\nask it yourself: trimkv-run {args.artefact} --chat --prompt 'Remember: the color is red.'")
    if wrong:
        print(f"{wrong} answers were wrong")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", type=Path, default=Path("artefacts/tiny"), help="made if it is not there")
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the text (default 100000)")
    parser.add_argument("--budget", type=int, default=128, help="entries per head of a new artefact (default 128)")
    parser.add_argument("--gates", default="rg10", help="rg or rg10, of a new artefact (default rg10)")
    args = parser.parse_args()
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
