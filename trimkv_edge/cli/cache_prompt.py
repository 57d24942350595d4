"""``trimkv-cache-prompt``: reads a text once and saves the session, for ``trimkv-run --session``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trimkv_edge.budget import format_bytes
from trimkv_edge.cli.common import add_engine, run_cli
from trimkv_edge.cli.run import encode_prompt, feed, read_prompt, warn

_EPILOG = """\
examples:
  trimkv-cache-prompt artefacts/tiny --prompt-file manual.txt -o manual.session
  trimkv-run artefacts/tiny --session manual.session --prompt "What is the gate?"
  cat notes.txt | trimkv-cache-prompt artefacts/tiny --prompt-file - -o notes.session --engine onnx

The text may be of any length; the file is as large as the cache. It goes on in every engine of the same artefact, as
often as you like: trimkv-run reads it and leaves it as it is.

exit codes: 0 done, 2 wrong input or not enough memory or disk, 130 interrupted (nothing was saved)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-cache-prompt",
        description="Read a text once through an exported model and save the state, so that later runs start from it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add("--prompt-file", required=True, metavar="FILE", help="a UTF-8 file with the text (- for standard input)")
    add("-o", "--output", type=Path, required=True, metavar="STATE", help="file for the session; replaced if it exists")
    add(
        "--note-tokens", action="store_true", help="also store the tokens read: 4 bytes each, so it grows with the text"
    )
    add_engine(parser)
    add("--progress", action="store_true", help="show the progress even if stderr is no terminal")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.session import Session
    from trimkv_edge.runtime.session_file import SessionFile
    from trimkv_edge.runtime.vision_text import Reading

    prompt = read_prompt(None, args.prompt_file, False)
    artefact = Artefact.load(args.artefact, verify=not args.no_verify)
    tokens = encode_prompt(artefact, prompt, chat=False)
    # Before the text is read: that may take long.
    with SessionFile(args.output).open() as file:
        session = Session.open(
            artefact, args.engine, args.threads, checkpoints=0, note_tokens=args.note_tokens, warn=warn
        )
        feed(session, Reading(tokens), args.progress or sys.stderr.isatty())
        session.save(file)
    size = format_bytes(args.output.stat().st_size)
    print(f"saved {args.output}: {len(tokens)} tokens in {size}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
