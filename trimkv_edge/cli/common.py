"""What all commands share: how they end."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from trimkv_edge.errors import ConfigError, TrimKVError

if TYPE_CHECKING:
    from trimkv_edge.manifest import Manifest

DEBUG_VARIABLE = "TRIMKV_DEBUG"
EXIT_ERROR = 2  # the input or the machine: the user can act on it (argparse uses it too)
EXIT_INTERNAL = 70  # a mistake of this program
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141


def run_cli(command: Callable[[], None]) -> None:
    """Runs a command's work and turns every failure into one line on stderr and an exit code.

    Returns normally on success. 2: an error the user can act on; 130: Ctrl-C; 141: the reader of stdout went away
    (quiet); 70: a mistake of the program. With ``TRIMKV_DEBUG=1`` exceptions are raised as they are.
    """
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except MemoryError:
        _fail("error: out of memory: free memory or choose a smaller budget or model", EXIT_ERROR)
    except (TrimKVError, OSError) as error:
        if _debug():
            raise
        _fail(f"error: {one_line(error)}", EXIT_ERROR)
    except Exception as error:
        if _debug():
            raise
        _fail(
            f"internal error: {type(error).__name__}: {one_line(error)} "
            f"(run with {DEBUG_VARIABLE}=1 for the traceback)",
            EXIT_INTERNAL,
        )


def add_engine(parser: argparse.ArgumentParser, engine: str = "the engine") -> None:
    """Options of commands that run an artefact; ``engine``: whose threads they are, for the help."""
    add = parser.add_argument
    add(
        "--engine",
        metavar="NAME",
        help="onnx, onnx:cuda (fails without CUDA), onnx:auto (CUDA, else the CPU), executorch, torch, torch:int8 or "
        "torch:int4 (weights rounded while loading) or another target of the artefact (default: its first that is "
        "installed)",
    )
    add("--threads", type=int, metavar="N", help=f"threads of {engine} (default: its own choice)")
    add("--no-verify", action="store_true", help="do not compare the files with their sha256: starts faster")


def warn_random_weights(manifest: Manifest) -> None:
    """Says on stderr that text of random weights means nothing."""
    if manifest.model.random_weights:
        print("warning: this artefact has random weights: its text means nothing", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def _fail(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def _debug() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def quiet_libraries() -> None:
    """Keeps notices of torch, ExecuTorch and transformers off the terminal, unless TRIMKV_DEBUG is set."""
    if _debug():
        return
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.utils._pytree", "torchao", "transformers", "executorch", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parse_share(text: str, option: str) -> float:
    """``99%`` or ``0.99``.

    Raises:
        ConfigError: no number; whether it is in range is for who uses it.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not a share: give one like 99% or 0.99") from error
