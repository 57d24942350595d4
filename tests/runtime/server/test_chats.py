"""Chats that go back, that another one displaces, and that outlive the server: none of it changes what is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from running_server import Running, answers, ask, running, said, slow, until

from trimkv_edge.runtime.server.store import Store

TURNS = ["hello", "the dog sat on the log", "the mat"]


def cached(reply: object) -> int:
    return reply.usage.prompt_tokens_details.cached_tokens  # type: ignore[attr-defined,no-any-return]


def talk(server: Running, name: str | None, count: int = 3) -> list[str]:
    """Some turns; returns what was said so far, questions and answers."""
    history: list[str] = []
    for text in TURNS[:count]:
        history.append(text)
        history.append(ask(server, said(*history), name).choices[0].message.content)
    return history


def test_a_turn_asked_again_or_changed_goes_back_to_where_it_began() -> None:
    with running(1, undo=2) as server:
        history = talk(server, "anna")
        assert history[1::2] == answers(*TURNS)
        again = ask(server, said(*history[:-1]), "anna")
        assert (again.choices[0].message.content, cached(again) > 0) == (history[-1], True)
        # Two turns back, and another question there.
        other = ask(server, said(*history[:2], "a cat"), "anna")
        assert (other.choices[0].message.content, cached(other) > 0) == (answers("hello", "a cat")[1], True)
        # Three are more than are kept.
        first = ask(server, said("a cat"), "anna")
        assert (first.choices[0].message.content, cached(first)) == (answers("a cat")[0], 0)


@pytest.mark.parametrize("undo", [0, 1])
def test_a_turn_that_breaks_off_leaves_the_chat_as_it_was(undo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1, undo=undo) as server:
        history = talk(server, "anna", 2)
        with monkeypatch.context() as patch:
            slow(server, patch)
            stream = ask(server, said(*history, TURNS[2]), "anna", max_tokens=10**6, stream=True)
            for _ in range(6):
                next(iter(stream))
            stream.close()
            assert until(lambda: server.pool.busy == 0)
        reply = ask(server, said(*history, TURNS[2]), "anna")
        assert cached(reply) > 0 if undo else cached(reply) == 0
        if undo:  # without, the template's words are read again, and not the tokens that were said
            assert reply.choices[0].message.content == answers(*TURNS)[2]


@pytest.mark.parametrize("undo", [0, 1])
def test_metrics_tell_what_undo_holds(undo: int) -> None:
    def held() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("trimkv_undo_bytes")))

    with running(1, undo=undo) as server:
        engine = server.pool.slots[0].session.engine
        talk(server, "anna", 1)
        assert held() == 0
        talk(server, "anna")
        # Keys and values, a log-beta and a position for each entry; logits and a bit for each token.
        entry = engine.num_layers * engine.num_kv_heads * (2 * 4 * engine.head_dim + 4 + 8)
        place = 4 * engine.vocab_size + -(-engine.vocab_size // 8)
        found = held() - undo * place
        assert engine.seen > engine.config.slots
        assert (found == 0) if not undo else (0 < found <= engine.config.slots * entry and found % entry == 0)


def test_a_displaced_chat_goes_on_from_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with running(1, store=store) as server:
        anna = talk(server, "anna", 2)
        bert = talk(server, "bert", 2)
        assert len(store.files()) == 1
        reply = ask(server, said(*anna, TURNS[2]), "anna")
        assert (reply.choices[0].message.content, cached(reply) > 0) == (answers(*TURNS)[2], True)
        reply = ask(server, said(*bert, TURNS[2]), "bert")
        assert (reply.choices[0].message.content, cached(reply) > 0) == (answers(*TURNS)[2], True)
        assert len(store.files()) == 1
        # A completion displaces a chat too; a chat without an id is told by its messages alone.
        nameless = talk(server, None, 2)
        server.client.completions.create(model="small", prompt="x", max_tokens=1)
        reply = ask(server, said(*nameless, TURNS[2]))
        assert (reply.choices[0].message.content, cached(reply) > 0) == (answers(*TURNS)[2], True)


def test_chats_outlive_the_server(tmp_path: Path) -> None:
    with running(2, store=Store(tmp_path)) as server:
        histories = {name: talk(server, name, 2) for name in ("anna", "bert")}
    assert len(Store(tmp_path).files()) == 2
    names = "".join(path.name for path in Store(tmp_path).files())
    assert "anna" not in names
    with running(2, store=Store(tmp_path)) as server:
        for name, history in histories.items():
            reply = ask(server, said(*history, TURNS[2]), name)
            assert (reply.choices[0].message.content, cached(reply) > 0) == (answers(*TURNS)[2], True)
        assert Store(tmp_path).files() == []


def test_damaged_and_surplus_files(tmp_path: Path) -> None:
    with running(1, store=Store(tmp_path, limit=2)) as server:
        chats = {name: talk(server, name, 1) for name in "abcd"}
        assert len(Store(tmp_path).files()) == 2  # of a, b and c, which were displaced, a's was the oldest
        assert cached(ask(server, said(*chats["a"], "x"), "a")) == 0
        for path in Store(tmp_path).files():
            path.write_bytes(path.read_bytes()[:-9])
        damaged, fresh = (ask(server, said(*chats["d"], TURNS[1]), name) for name in ("d", "e"))
        assert (damaged.choices[0].message.content, cached(damaged)) == (fresh.choices[0].message.content, 0)
    with pytest.raises(Exception, match="at least 1 is needed"):
        Store(tmp_path, 0)


@pytest.fixture
def server() -> Iterator[Running]:
    with running(1) as one:
        yield one


def test_developers_speak_as_the_system(server: Running) -> None:
    messages = said("the cat", system="be kind")
    messages[0]["role"] = "developer"
    assert ask(server, messages).choices[0].message.content == answers("the cat", system="be kind")[0]


def test_requests_wait_in_line_and_clients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one answer is made, a client asks three times and then another once, who is served second."""
    with running(1, waiting=4) as server:
        slow(server, monkeypatch)
        ended: list[str] = []

        def one(name: str, user: str) -> None:
            ask(server, said("the cat"), max_tokens=60 if name == "a0" else 2, user=user)
            ended.append(name)

        threads = []
        for number, (name, user) in enumerate([("a0", "a"), ("a1", "a"), ("a2", "a"), ("a3", "a"), ("b0", "b")]):
            threads.append(threading.Thread(target=one, args=(name, user)))
            threads[-1].start()
            assert until(lambda number=number: server.pool.busy == 1 and waiting(server) == number)
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="4 requests wait") as found:
            ask(server, said("the cat"))
        assert int(found.value.response.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join(20)
        assert ended == ["a0", "a1", "b0", "a2", "a3"]


def waiting(server: Running) -> int:
    return int(httpx.get(f"{server.url}/healthz").json()["waiting"])


def test_who_leaves_the_line_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1) as server:
        slow(server, monkeypatch)
        stream = ask(server, said("the cat"), "anna", max_tokens=10**6, stream=True)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            ask(server, said("the cat"), "bert", timeout=0.3)
        assert until(lambda: waiting(server) == 0)
        stream.close()
        assert ask(server, said("the cat"), "carla").choices[0].message.content == answers("the cat")[0]
        assert server.pool.busy == 0


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1, timeout=0.4) as server:
        slow(server, monkeypatch)
        stream = ask(server, said("the cat"), "anna", max_tokens=10**6, stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as found:
            ask(server, said("the cat"), "anna")
        assert found.value.status_code == 504
        stream.close()
