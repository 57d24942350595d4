"""``trimkv-run``: reads a prompt of any length through an artefact and streams the continuation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from trimkv_edge.budget import format_bytes
from trimkv_edge.cli.common import add_engine, quiet_libraries, run_cli, warn_random_weights
from trimkv_edge.cli.generation import add_generation, sampling_of, stops_of
from trimkv_edge.cli.pictures import add_order, add_pictures, read_pictures
from trimkv_edge.cli.run_model import add_model, check_model, open_model
from trimkv_edge.errors import ArtefactError, ConfigError, reason

if TYPE_CHECKING:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.sampling import Sampler, SamplingParams
    from trimkv_edge.runtime.session import Session
    from trimkv_edge.runtime.vision import Shown
    from trimkv_edge.runtime.vision_text import Reading

_EPILOG = """\
examples:
  trimkv-run artefacts/tiny --prompt "Once upon a time"
  trimkv-run artefacts/tiny --prompt-file book.txt --max-new-tokens 64 --stats text
  cat notes.txt | trimkv-run artefacts/tiny - --stop "\\n\\n"
  trimkv-run artefacts/qwen3-4b --chat --prompt "Hello" --temperature 0.7 --top-p 0.9 --seed 1
  trimkv-run artefacts/qwen3-vl-4b --chat --image cat.png --image dog.jpg --prompt "Which one is larger?"
  trimkv-run artefacts/tiny --session manual.session --prompt "What is the gate?" --save-session talk.session
  trimkv-run --engine torch --model tiny --budget 128 --prompt-file book.txt

The prompt may be far longer than the cache: it is read in chunks, and after every --buffer tokens (a setting of the
export) each KV head keeps its best entries. Memory stays what the artefact's manifest says. Text goes to stdout,
everything else to stderr. \\n, \\t and \\\\ in --stop stand for the characters.

--session goes on where a session was saved (trimkv-cache-prompt, --save-session): the prompt is read after it, without
the tokens that begin a text, and may be left out. Without options of its own, drawing goes on as it stopped.

--image and --video are shown in the order given, before the prompt. A prompt without --chat that names places itself
(<|vision_start|><|image_pad|><|vision_end|>) has them there. A video is decoded and read frame by frame, so a long one
takes no more memory.

exit codes: 0 done, 2 wrong input or not enough memory, 130 interrupted (the text so far was printed)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-run",
        description="Run an exported model over a prompt of any length in a fixed amount of memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", nargs="?", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add_prompt(parser)
    add_order(add_pictures(parser))
    add("--session", type=Path, metavar="STATE", help="go on from a saved session, which stays as it is")
    add("--save-session", type=Path, metavar="STATE", help="save the session at the end, also after Ctrl-C")
    add_engine(parser)
    add_model(parser)
    add_generation(parser, 256)
    report = parser.add_argument_group("reports").add_argument
    report("--stats", choices=["text", "json"], help="print statistics to stderr; json is its last line")
    report("--stats-file", type=Path, metavar="FILE", help="write statistics as JSON to FILE")
    report("--profile", action="store_true", help="print where the engine's time went, by operator, to stderr")
    report("--progress", action="store_true", help="show the prompt's progress even if stderr is no terminal")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    # Intermixed, so that the "-" may stand anywhere among the options.
    args = build_parser().parse_intermixed_args(argv)
    if args.model is not None and args.artefact == Path("-"):
        args.artefact, args.stdin = None, "-"
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.session import Session
    from trimkv_edge.runtime.session_file import SessionFile

    # What costs nothing is checked before what costs seconds.
    check_model(args)
    sampling = sampling_of(args)
    if args.stats_file is not None and not args.stats_file.absolute().parent.is_dir():
        raise ConfigError(f"--stats-file {args.stats_file} lies in no existing folder: make the folder first")
    prompt = _prompt(args)
    engine = None
    if args.model is None:
        artefact = Artefact.load(args.artefact, verify=not args.no_verify)
    else:
        quiet_libraries()
        artefact, engine = open_model(args)
    shown = read_pictures(args, artefact)
    reading = None
    if prompt is not None or shown:
        begins, last = args.session is None, args.pictures_last
        reading = prompt_reading(artefact, prompt or "", args.chat, begins=begins, shown=shown, last=last)
    warn_random_weights(artefact.manifest)
    with ExitStack() as stack:
        target = args.save_session and stack.enter_context(SessionFile(args.save_session).open())
        if engine is None:
            session = Session.open(artefact, args.engine, args.threads, profile=args.profile, checkpoints=0, warn=warn)
        else:
            session = Session.over(engine, artefact, checkpoints=0, warn=warn)
        if args.session is not None:
            session.load(args.session)
        try:
            if reading:
                feed(session, reading, args.progress or sys.stderr.isatty())
            if target:
                # Not before: half a prompt is nothing to go on from.
                stack.callback(session.save, target)
            _stream(session, args, artefact, sampling)
        finally:
            _report(session, args)


def _prompt(args: argparse.Namespace) -> str | None:
    """None: nothing to read before a saved session goes on."""
    if args.session is not None:
        if args.chat:
            raise ConfigError(
                "--chat begins a conversation and --session goes on with one: leave out --chat and write the turn as "
                "the artefact's template does"
            )
        if args.prompt is None and args.prompt_file is None and args.stdin is None:
            return None
    return read_prompt(args.prompt, args.prompt_file, args.stdin is not None)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Where the prompt comes from: options that :func:`read_prompt` and :func:`encode_prompt` take."""
    add = parser.add_argument
    add("stdin", nargs="?", choices=["-"], metavar="-", help="read the prompt from standard input")
    add("--prompt", metavar="TEXT", help="the prompt itself")
    add("--prompt-file", metavar="FILE", help="a UTF-8 file with the prompt (- for standard input)")
    add("--chat", action="store_true", help="send the prompt as one user message through the artefact's chat template")


def read_prompt(text: str | None, file: str | None, stdin: bool) -> str:
    """The prompt from exactly one of its sources.

    Raises:
        ConfigError: none or several sources, no such file, not UTF-8, or an empty prompt.
    """
    if (text is not None) + (file is not None) + stdin != 1:
        raise ConfigError("give the prompt once: --prompt TEXT, --prompt-file FILE, or - for standard input")
    if text is None:
        stdin = stdin or file == "-"
        where = "standard input" if stdin else str(file)
        if stdin and sys.stdin is None:
            raise ConfigError("standard input is closed: use --prompt or --prompt-file")
        try:
            data = sys.stdin.buffer.read() if stdin else Path(str(file)).read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigError(f"prompt file {where} cannot be read: {reason(error)}") from error
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"prompt file {where} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}: "
                "convert it first (iconv -t UTF-8)"
            ) from error
    if not text:
        raise ConfigError("the prompt is empty: give some text")
    return text


def encode_prompt(artefact: Artefact, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt that begins a text, through the chat template if ``chat``; errors as of
    :func:`prompt_reading`."""
    return prompt_reading(artefact, prompt, chat).tokens


def prompt_reading(
    artefact: Artefact,
    prompt: str,
    chat: bool,
    *,
    begins: bool = True,
    shown: Sequence[Shown] = (),
    last: bool = False,
) -> Reading:
    """The prompt behind its pictures, or before them if they come ``last``; through the chat template if ``chat``; with
    the tokens that begin a text if it ``begins`` one.

    Raises:
        ArtefactError: the artefact has no tokenizer or no chat template.
        ConfigError: the prompt is not valid Unicode, has no tokens, or has more or fewer places than pictures.
    """
    from trimkv_edge.runtime.vision_text import PictureText

    tokenizer, info = artefact.tokenizer, artefact.manifest.tokenizer
    if tokenizer is None or info is None:
        raise ArtefactError(
            f"{artefact.folder} has no tokenizer (random weights have none), so it cannot read text: "
            "drive it with token ids through trimkv_edge.runtime.session"
        )
    texts = PictureText(tokenizer, artefact.manifest.vision)
    if chat:
        if artefact.chat_template is None:
            raise ArtefactError(f"{artefact.folder} has no chat_template.jinja: leave out --chat")
        from trimkv_edge.runtime.chat import content_of, render_chat

        texts.check_plain(prompt)
        message = {"role": "user", "content": content_of([one.kind for one in shown], prompt, last)}
        prompt = render_chat(artefact.chat_template, [message], artefact.special_tokens())
    elif shown and not texts.has_places(prompt):
        prompt = prompt + texts.before(shown, "") if last else texts.before(shown, prompt)
    # A template writes its special tokens itself.
    reading = texts.encode(prompt, shown, begins=begins and not chat)
    if not reading.tokens:
        raise ConfigError("the prompt has no tokens: give some text")
    return reading


def feed(session: Session, reading: Reading, show: bool) -> None:
    """Reads the prompt; with a progress bar on stderr if ``show``."""
    from trimkv_edge.runtime.statistics import rss_bytes

    total = len(reading.tokens)
    with tqdm(total=total, desc="prompt", unit="tok", file=sys.stderr, disable=not show, dynamic_ncols=True) as bar:
        for done, _ in reading.feeding(session):
            if show:
                bar.set_postfix_str(f"memory {format_bytes(rss_bytes())}", refresh=False)
                bar.update(done - bar.n)


def _stream(session: Session, args: argparse.Namespace, artefact: Artefact, asked: SamplingParams | None) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    info = artefact.manifest.tokenizer
    eos, stops = [] if info is None else info.eos_token_ids, stops_of(args)
    pieces = session.generate(args.max_new_tokens, _sampler(session, asked), eos, stops)
    written = False
    try:
        for piece in pieces:
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                written = True
    finally:
        if written:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _sampler(session: Session, asked: SamplingParams | None) -> Sampler | SamplingParams:
    """What was asked for; else the loaded session's own; else greedy."""
    from trimkv_edge.runtime.sampling import SamplingParams

    return asked or session.sampler or SamplingParams()


def _report(session: Session, args: argparse.Namespace) -> None:
    statistics = session.statistics()
    if args.profile:
        from trimkv_edge.runtime.engines.base import ArtefactEngine
        from trimkv_edge.runtime.profile import lines

        assert isinstance(session.engine, ArtefactEngine)
        print(*lines(session.engine.profile_rows()), sep="\n", file=sys.stderr, flush=True)
    engine = session.engine.name
    if args.stats_file is not None:
        args.stats_file.write_text(json.dumps({"engine": engine, **statistics.as_dict()}) + "\n", encoding="utf-8")
    if args.stats == "json":
        print(json.dumps({"engine": engine, **statistics.as_dict()}), file=sys.stderr, flush=True)
    elif args.stats == "text":
        print(f"engine    {engine}", *statistics.lines(), sep="\n", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """On stderr, beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
