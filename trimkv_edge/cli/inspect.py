"""``trimkv-inspect``: reads a prompt through an artefact and shows what the cache held, when, in one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.budget import format_bytes
from trimkv_edge.cli.common import add_engine, run_cli, warn_random_weights
from trimkv_edge.cli.generation import add_generation, sampling_of, stops_of
from trimkv_edge.cli.pictures import add_order, add_pictures, read_pictures
from trimkv_edge.cli.run import add_prompt, prompt_reading, read_prompt, warn
from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.files import replace_text

if TYPE_CHECKING:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.recording import Recording
    from trimkv_edge.runtime.report.page import About
    from trimkv_edge.runtime.sampling import SamplingParams
    from trimkv_edge.runtime.session import Session
    from trimkv_edge.runtime.vision_text import Reading

_PAGE = "report.html"
_EPILOG = """\
examples:
  trimkv-inspect artefacts/tiny --prompt-file README.md
  trimkv-inspect artefacts/tiny --prompt-file talk.txt --max-new-tokens 64 -o talk.html --png plots
  cat notes.txt | trimkv-inspect artefacts/tiny - --engine onnx --json notes.json
  trimkv-inspect artefacts/qwen3-vl-4b --chat --image cat.png --image dog.jpg --prompt "Which one is larger?"

The page is one file that opens without a network. It shows the text with each token shaded by how many heads still
hold it, at any moment of the stream, and what each layer and head keeps; of a picture, which parts. What is read and
chosen is what trimkv-run would read and choose; text and pictures are in the page, so pass it on as you would them.

exit codes: 0 done, 2 wrong input or not enough memory, 130 interrupted (nothing was written)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-inspect",
        description="Show which tokens of a text an exported model keeps in its cache, where and for how long.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add_prompt(parser)
    add_order(add_pictures(parser))
    out = parser.add_argument_group("output").add_argument
    out(
        "-o",
        "--output",
        type=Path,
        default=Path(_PAGE),
        metavar="FILE",
        help=f"the page (default {_PAGE}); replaced if it exists",
    )
    out("--png", type=Path, metavar="DIR", help="also write plots as PNG files into this folder")
    out("--json", type=Path, metavar="FILE", help="also write the numbers: when each token left each head, and speed")
    out("--progress", action="store_true", help="show the progress even if stderr is no terminal")
    add_engine(parser)
    add_generation(parser, 0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_intermixed_args(argv)
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.report.page import build_page, heads_to_show
    from trimkv_edge.runtime.report.pictures import row_texts
    from trimkv_edge.runtime.report.text import token_texts
    from trimkv_edge.runtime.session import Session

    # What costs nothing is checked before what costs seconds.
    sampling = sampling_of(args)
    _check_outputs(args)
    prompt = read_prompt(args.prompt, args.prompt_file, args.stdin is not None)
    artefact = Artefact.load(args.artefact, verify=not args.no_verify)
    shown = read_pictures(args, artefact)
    reading = prompt_reading(artefact, prompt, args.chat, shown=shown, last=args.pictures_last)
    model = artefact.manifest.model
    heads = heads_to_show(len(reading.tokens) + args.max_new_tokens, model.num_layers, model.num_kv_heads)
    warn_random_weights(artefact.manifest)
    if len(heads) < model.num_kv_heads:
        warn(_some_heads(len(heads), model.num_kv_heads))
    session = Session.open(artefact, args.engine, args.threads, checkpoints=0, warn=warn)
    recording = _record(session, reading, args, artefact, sampling, heads)
    about = _about(session, artefact, recording)
    assert artefact.tokenizer is not None  # prompt_reading saw to it
    page = build_page(recording, row_texts(token_texts(artefact.tokenizer, recording.tokens), recording), about)
    replace_text(args.output, page)
    written = [f"{args.output} ({format_bytes(args.output.stat().st_size)})"]
    if args.json is not None:
        replace_text(args.json, json.dumps(_numbers(recording)) + "\n")
        written.append(str(args.json))
    if args.png is not None:
        from trimkv_edge.runtime.report.plots import plot_all

        written.append(f"{len(plot_all(recording, about, args.png))} plots in {args.png}")
    count, events = len(recording.tokens), len(recording.lifetimes.events)
    print(f"wrote {', '.join(written)}: {count} tokens, {events} events", file=sys.stderr, flush=True)


def _check_outputs(args: argparse.Namespace) -> None:
    for option, path in (("-o", args.output), ("--json", args.json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path} lies in no existing folder: make the folder first")
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} {path} is a folder: give the name of a file")
    if args.json is not None and args.json.absolute() == args.output.absolute():
        raise ConfigError(f"-o and --json are both {args.json}: give one of them another name")
    if args.png is None:
        return
    if args.png.exists() and not args.png.is_dir():
        raise ConfigError(f"--png {args.png} is a file: give a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TrimKVError(f"--png needs matplotlib ({error}): pip install 'trimkv-edge[inspect]'") from error


def _record(
    session: Session,
    reading: Reading,
    args: argparse.Namespace,
    artefact: Artefact,
    sampling: SamplingParams | None,
    heads: tuple[int, ...],
) -> Recording:
    from trimkv_edge.runtime.recording import record
    from trimkv_edge.runtime.sampling import SamplingParams

    info = artefact.manifest.tokenizer
    hidden = not (args.progress or sys.stderr.isatty())
    total = len(reading.tokens) + args.max_new_tokens
    with tqdm(total=total, desc="stream", unit="tok", file=sys.stderr, disable=hidden, dynamic_ncols=True) as bar:

        def progress(seen: int, _: int) -> None:
            bar.update(seen - bar.n)

        return record(
            session,
            reading,
            args.max_new_tokens,
            sampling=sampling or SamplingParams(),
            stop_ids=[] if info is None else info.eos_token_ids,
            stop_strings=stops_of(args),
            heads=heads,
            vision=artefact.manifest.vision,
            progress=progress,
        )


def _about(session: Session, artefact: Artefact, recording: Recording) -> About:
    from trimkv_edge.runtime.report.page import About

    manifest, cache = artefact.manifest, artefact.manifest.cache
    model, made = manifest.model, len(recording.tokens) - recording.prompt_tokens
    count = f"{len(recording.tokens):,}" + (f", {made:,} of them generated" if made else "")
    facts = [
        ("model", model.name),
        ("engine", session.engine.name),
        ("policy", cache.policy if manifest.gates.kind == "none" else f"{cache.policy}, gates {manifest.gates.kind}"),
        ("budget", f"{cache.budget:,} entries per head" + (" on average" if cache.caps else "")),
        ("buffer", f"{cache.buffer:,} new ones"),
        ("heads", f"{model.num_layers} layers × {model.num_kv_heads} KV heads"),
        ("tokens", count),
        ("events", f"{len(recording.lifetimes.events):,}"),
        ("the cache", format_bytes(manifest.bytes.cache)),
    ]
    if recording.pictures:
        rows = sum(picture.rows for picture in recording.pictures)
        facts.insert(7, ("pictures", f"{len(recording.pictures):,}, of {rows:,} rows"))
    shown, notes = len(recording.lifetimes.heads), []
    if shown < model.num_kv_heads:
        notes.append(_some_heads(shown, model.num_kv_heads))
    if model.random_weights:
        notes.append("this artefact has random weights: what it keeps means nothing")
    return About(artefact.folder.resolve().name, facts, cache.slots, model.num_kv_heads, notes)


def _some_heads(shown: int, heads: int) -> str:
    return f"the text is long: the page shows {shown} of {heads} KV heads of each layer, evenly spaced"


def _numbers(recording: Recording) -> dict[str, object]:
    from trimkv_edge.runtime.lifetimes import LEFT_NEVER
    from trimkv_edge.runtime.report import pictures

    lifetimes = recording.lifetimes
    left = [[[None if at == LEFT_NEVER else at for at in head] for head in layer] for layer in lifetimes.left.tolist()]
    return {
        "tokens": recording.tokens,
        "prompt_tokens": recording.prompt_tokens,
        "heads": list(lifetimes.heads),
        "events": lifetimes.events.tolist(),
        "left": left,
        "chunks": [chunk._asdict() for chunk in recording.chunks],
        **pictures.numbers(recording),
    }


if __name__ == "__main__":
    main()
