"""``trimkv-serve``: an artefact behind OpenAI's HTTP interface, in a fixed amount of memory."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.cli.common import add_engine, run_cli, warn_random_weights
from trimkv_edge.errors import ConfigError, TrimKVError

if TYPE_CHECKING:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.constraint import Grammars

_GRACE_S = 5
# Longer than clients keep idle connections (5 s in httpx, so in openai): else one is closed just when it is used again.
_KEEP_ALIVE_S = 75

_EPILOG = """\
examples:
  trimkv-serve artefacts/qwen3-4b --sessions 2
  KEY=... trimkv-serve artefacts/qwen3-4b --host 0.0.0.0 --api-key-env KEY

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Conversation-Id: anna' \\
    -d '{"model": "qwen3-4b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  said = [{"role": "user", "content": "Hello"}]
  for part in client.chat.completions.create(model="qwen3-4b", messages=said, stream=True,
                                             extra_body={"conversation": "anna"}):
      print(part.choices[0].delta.content or "", end="")

Models that read pictures take them as image_url parts: data: URLs, and files inside --image-folder; nothing is fetched
from other servers.

The model's name is the artefact's folder name. A conversation keeps its session, so that its next turn reads only the
new message; send the whole list of messages as usual. When all sessions are answering, --waiting requests wait, and
more get 503 with Retry-After. With --state-dir, chats that no session has room for, and all of them at the end, are
saved and go on from there. A turn that was broken off or is asked again makes the whole chat be read again, unless
--undo keeps the place where it began, which may cost a copy of the cache for each. What is not supported is refused
with 400. http://127.0.0.1:8000/ is a page for people; /healthz and /metrics tell how the server is.

exit codes: 0 ended by SIGTERM, 130 by Ctrl-C, 2 wrong input, port in use or not enough memory
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-serve",
        description="Serve an exported model over HTTP with OpenAI's interface, in a fixed amount of memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1); others need --api-key-env")
    add("--port", type=int, default=8000, help="port (default 8000; 0: any free one)")
    add("--sessions", type=int, default=4, metavar="N", help="chats held in memory (default 4); each costs a cache")
    add("--waiting", type=int, default=64, metavar="N", help="requests that may wait for a session (default 64)")
    add(
        "--undo",
        type=int,
        default=0,
        metavar="K",
        help="turns of a chat that can be asked again (default 0); see below",
    )
    add("--state-dir", type=Path, metavar="DIR", help="folder for chats that no session holds (default: forget them)")
    add("--saved", type=int, default=64, metavar="N", help="most chats in --state-dir (default 64); the oldest go")
    add("--image-folder", type=Path, metavar="DIR", help="folder whose pictures requests may name (default: none)")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key clients must send")
    add("--timeout", type=float, default=300.0, metavar="S", help="most seconds for one answer (default 300)")
    add_engine(parser, "each session's engine")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from trimkv_edge.runtime.artefact import Artefact

    key = _key(args.api_key_env)
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port is {args.port}, but must be from 0 to 65535")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TrimKVError(f"trimkv-serve needs a package ({error}): pip install 'trimkv-edge[serve]'") from error
    from trimkv_edge.runtime.server.guards import is_loopback

    if key is None and not is_loopback(args.host):
        raise ConfigError(f"--host {args.host} lets other machines in: give --api-key-env NAME, or use 127.0.0.1")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:
        _serve(Artefact.load(args.artefact, verify=not args.no_verify), listener, key, args)


def _serve(artefact: Artefact, listener: socket.socket, key: str | None, args: argparse.Namespace) -> None:
    import uvicorn

    from trimkv_edge.runtime.server.app import make_app
    from trimkv_edge.runtime.server.pictures import PictureSource
    from trimkv_edge.runtime.server.pool import SlotPool
    from trimkv_edge.runtime.server.store import Store

    name = artefact.folder.resolve().name
    grammars, vision = _grammars(artefact), artefact.manifest.vision
    pictures = PictureSource(vision, args.image_folder) if vision or args.image_folder else None
    store = None if args.state_dir is None else Store(args.state_dir, args.saved)
    pool = SlotPool.open(artefact, args.sessions, args.engine, args.threads, undo=args.undo, store=store)
    try:
        app = make_app(
            pool,
            name,
            grammars=grammars,
            pictures=pictures,
            api_key=key,
            timeout=args.timeout,
            waiting=args.waiting,
        )
        warn_random_weights(artefact.manifest)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"serving {name} at http://{host}:{listener.getsockname()[1]}/v1 with {args.sessions} sessions",
            file=sys.stderr,
            flush=True,
        )
        # What exists now stays: the garbage collector then looks at requests only, and does so more often.
        gc.collect()
        gc.freeze()
        # uvicorn ends gracefully and then raises the signal again, for this handler.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        pool.close()


def _grammars(artefact: Artefact) -> Grammars | None:
    from trimkv_edge.runtime.constraint import Grammars

    try:
        return Grammars(artefact)
    except TrimKVError as error:
        print(f"warning: no JSON output: {error}", file=sys.stderr, flush=True)
        return None


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise ConfigError(f"--api-key-env {name}: this environment variable is not set or empty")
    return key


if __name__ == "__main__":
    main()
