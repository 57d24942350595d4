"""The server over the tests' text artefact, in a thread, at a free port; shared by tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from openai import OpenAI
from text_artefact import text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.constraint import Grammars
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.server.app import make_app
from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.server.store import Store
from trimkv_edge.runtime.session import Session

MODEL = "small"


class Running(NamedTuple):
    """A server and a client for it."""

    url: str
    pool: SlotPool
    client: OpenAI


@contextmanager
def running(
    sessions: int = 2, undo: int = 0, store: Store | None = None, folder: Path | None = None, **settings: Any
) -> Iterator[Running]:
    """A server until the block ends; ``folder``: of its artefact, if it is not the text one."""
    artefact = Artefact.load(folder or text_artefact())
    pool = SlotPool.open(artefact, sessions, "onnx", 1, undo=undo, store=store)
    settings.setdefault("grammars", Grammars(artefact))
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


def said(*texts: str, system: str | None = None) -> list[Any]:
    roles = ["user", "assistant"]
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def ask(server: Running, messages: list[Any], conversation: str | None = None, **settings: Any) -> Any:
    extra = settings.pop("extra_body", {}) | ({"conversation": conversation} if conversation else {})
    settings = {"max_tokens": 12, **settings}
    return server.client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **settings)


def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a moment, so that answers are still being made when the test acts."""
    for slot in server.pool.slots:
        plain = slot.session.engine.prefill

        def step(tokens: Any, plain: Any = plain) -> Any:
            time.sleep(0.05)
            return plain(tokens)

        monkeypatch.setattr(slot.session.engine, "prefill", step)


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
