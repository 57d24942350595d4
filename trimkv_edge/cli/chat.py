"""``trimkv-chat``: a conversation in the terminal that never outgrows its memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.cli.common import add_engine, run_cli, warn_random_weights
from trimkv_edge.cli.generation import add_generation, sampling_of, stops_of
from trimkv_edge.cli.pictures import add_order, add_video, video_settings
from trimkv_edge.errors import TrimKVError

if TYPE_CHECKING:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.conversation import Conversation

_EPILOG = """\
examples:
  trimkv-chat artefacts/qwen3-4b
  trimkv-chat artefacts/qwen3-4b --system "You are brief." --temperature 0.7 --top-p 0.9
  trimkv-chat artefacts/qwen3-4b --load friday.session
  printf 'Hello\\nAnd now?\\n' | trimkv-chat artefacts/qwen3-4b        # one message a line

Each turn reads only what is new: nothing is read again, and the cache stays as large as the artefact's manifest says.
Ctrl-C stops an answer; the chat goes on from what was said. Ctrl-D or /exit ends it. /help lists the commands:
/stats, /kept (which words the cache still holds), /undo, /save, /load, /reset, and for models that read pictures
/image and /video, which show them with the next message.

exit codes: 0 ended, 2 wrong input or not enough memory
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-chat",
        description="Chat with an exported model, for as long as you like, in a fixed amount of memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add("--system", metavar="TEXT", help="the system prompt (default: the template's own, if it has one)")
    add("--load", type=Path, metavar="FILE", help="go on with a chat that /save wrote, with any engine")
    add("--undo-depth", type=int, default=8, metavar="N", help="turns that /undo can take back (default 8; 0: none)")
    add_engine(parser)
    add_generation(parser, 512)
    group = parser.add_argument_group("/image and /video, for models that read pictures (docs/vision.md)")
    add_video(group)
    add_order(group)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.sampling import SamplingParams
    from trimkv_edge.runtime.vision import PictureReader

    sampling = sampling_of(args)  # what costs nothing is checked before what costs seconds
    try:
        from trimkv_edge.cli.chat_loop import ChatLoop
    except ImportError as error:
        raise TrimKVError(f"trimkv-chat needs a package ({error}): pip install 'trimkv-edge[chat]'") from error
    artefact = Artefact.load(args.artefact, verify=not args.no_verify)
    loop = ChatLoop(
        _conversation(artefact, args),
        sampling or SamplingParams(),
        args.max_new_tokens,
        stops_of(args),
        lambda: PictureReader.of(artefact),
        video_settings(args),
        args.pictures_last,
    )
    if args.load is not None:
        loop.load(str(args.load))
    warn_random_weights(artefact.manifest)
    loop.run()


def _conversation(artefact: Artefact, args: argparse.Namespace) -> Conversation:
    from trimkv_edge.runtime.conversation import Conversation
    from trimkv_edge.runtime.session import Session

    def warn(text: str) -> None:
        print(f"\nwarning: {text}", file=sys.stderr)

    session = Session.open(
        artefact, args.engine, args.threads, checkpoints=args.undo_depth, note_tokens=True, warn=warn
    )
    return Conversation.open(artefact, session, args.system)


if __name__ == "__main__":
    main()
