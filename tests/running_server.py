"""The server over the tests' text artefact, in a thread, at a free port; shared by tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from openai import OpenAI
from text_artefact import text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.server.app import make_app
from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.session import Session

MODEL = "small"


class Running(NamedTuple):
    """A server and a client for it."""

    url: str
    pool: SlotPool
    client: OpenAI


@contextmanager
def running(sessions: int = 2, **settings: Any) -> Iterator[Running]:
    """A server until the block ends."""
    pool = SlotPool.open(Artefact.load(text_artefact()), sessions, "onnx", 1)
    server = uvicorn.Server(uvicorn.Config(make_app(pool, MODEL, **settings), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            key = settings.get("api_key") or "none"
            yield Running(url, pool, OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30))
        finally:
            server.should_exit = True
            thread.join(20)
            pool.close()
    assert not thread.is_alive()


def answers(*messages: str, count: int = 12, system: str | None = None) -> list[str]:
    """What a conversation without a server says."""
    artefact = Artefact.load(text_artefact())
    talk = Conversation.open(artefact, Session.open(artefact, "onnx", 1), system)
    return ["".join(piece.text for piece in talk.ask(message, count)) for message in messages]


def until(happens: Any, seconds: float = 10.0) -> bool:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(happens())
