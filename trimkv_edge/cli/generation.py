"""Options of commands that generate text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trimkv_edge.errors import ConfigError

if TYPE_CHECKING:
    from trimkv_edge.runtime.sampling import SamplingParams


def add_generation(parser: argparse.ArgumentParser, count: int) -> None:
    """Adds them; ``count`` is the default of ``--max-new-tokens``. What is not given stays None."""
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=int, default=count, metavar="N", help=f"most tokens to generate (default {count})")
    add("--temperature", type=float, metavar="X", help="0 (default) takes the best token every time")
    add("--top-k", type=int, metavar="K", help="draw from the K best tokens (default 0: all)")
    add("--top-p", type=float, metavar="P", help="draw from the best tokens that reach P (default 1: all)")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the best (default 0: none)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 avoids repetition (default 1: off)")
    add("--seed", type=int, metavar="N", help="makes drawing repeatable")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given again")


def sampling_of(args: argparse.Namespace) -> SamplingParams | None:
    """What was asked for; None: nothing was.

    Raises:
        ConfigError: a value out of range.
    """
    from trimkv_edge.runtime.sampling import SamplingParams

    if args.max_new_tokens < 0:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}, but must be 0 or more")
    if not all(args.stop):
        raise ConfigError("--stop is empty: give at least one character")
    return SamplingParams.asked(args)


def stops_of(args: argparse.Namespace) -> list[str]:
    """``--stop`` with ``\\n``, ``\\t`` and ``\\\\`` as characters."""
    return [
        "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in stop.split("\\\\")) for stop in args.stop
    ]
