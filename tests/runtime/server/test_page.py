"""The page as files, and what it asks for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running_server import MODEL, Running, ask, running, said, slow, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")]
)
def test_files_come_with_a_policy_and_name_no_other_place(server: Running, path: str, kind: str) -> None:
    answer = httpx.get(server.url + path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://|innerHTML|\bon\w+=", answer.text)
    if path == "/":
        assert f"<h1>{MODEL}</h1>" in answer.text


def test_names_are_escaped() -> None:
    from fastapi import FastAPI

    from trimkv_edge.runtime.server.page import add_page
    from trimkv_edge.runtime.server.pool import SlotPool

    app = FastAPI()
    add_page(app, SlotPool([]), '"><script>x</script>$model', False)
    transport = httpx.ASGITransport(app)

    async def get() -> str:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/")).text

    import asyncio

    text = asyncio.run(get())
    assert "<script>x" not in text
    assert text.count("&lt;script&gt;x&lt;/script&gt;$model") >= 2


def test_memory_of_a_conversation(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server, said("the cat"), "anna")
    url = f"{server.url}/memory"
    view = httpx.get(url, params={"conversation": "anna"}).json()
    slot = server.pool.find("anna")
    assert slot is not None
    assert view["position"] == slot.session.engine.seen
    assert len(view["tokens"]) == len(set(slot.session.engine.survivors().reshape(-1).tolist()))
    assert httpx.get(url, params={"conversation": "anna"}).headers["cache-control"] == "no-store"
    unknown = httpx.get(url, params={"conversation": "nobody"})
    assert (unknown.status_code, "no session holds conversation 'nobody'" in unknown.text) == (404, True)
    assert unknown.json()["error"]["code"] == "no_session"
    missing = httpx.get(url)
    assert (missing.status_code, missing.json()["error"]["message"]) == (400, "conversation is missing")
    # It can be looked at while it answers.
    slow(server, monkeypatch)
    stream = ask(server, said("the dog"), "bert", max_tokens=40, stream=True)
    parts = iter(stream)
    next(parts)
    seen = [httpx.get(url, params={"conversation": "bert"}).json()["position"] for _ in range(3)]
    assert seen == sorted(seen)
    assert server.pool.busy == 1
    stream.close()


def test_a_chat_is_not_shown_to_the_next_one(server: Running) -> None:
    """A slot may pass on while a look waits for its turn, and holds the old text until the new answer begins."""
    ask(server, said("a secret"), "carla")
    slot = server.pool.find("carla")
    assert slot is not None
    url, free = f"{server.url}/memory", threading.Event()
    slot.worker.submit(free.wait, 20)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(httpx.get, url, params={"conversation": "carla"}, timeout=20)
        try:
            assert until(lambda: not slot.worker._inbox.empty())
            slot.conversation = "dora"  # as a claim does
        finally:
            free.set()
        assert waiting.result(20).status_code == 404
    assert httpx.get(url, params={"conversation": "dora"}).status_code == 404
    ask(server, said("the cat"), "dora")
    view = httpx.get(url, params={"conversation": "dora"}).json()
    assert "cat" in "".join(text for _, text, _ in view["tokens"])


def test_a_chat_that_was_broken_off_is_not_shown_to_the_next_one(server: Running) -> None:
    """Its text stays in the cache until another answer begins there, though no turn can go on from it."""
    ask(server, said("a secret"), "erna")
    slot = server.pool.find("erna")
    assert slot is not None
    slot.chat = None  # as an answer leaves it that did not come to its end
    assert httpx.get(f"{server.url}/memory", params={"conversation": "erna"}).status_code == 200
    slot.conversation = "fritz"  # as a claim does
    assert httpx.get(f"{server.url}/memory", params={"conversation": "fritz"}).status_code == 404
