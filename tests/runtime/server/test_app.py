"""The official client against a real server; expected texts come from conversations without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from running_server import MODEL, Running, answers, ask, running, said, slow, until
from text_artefact import text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


def schema_format(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}


def encode(text: str) -> list[int]:
    tokenizer = Artefact.load(text_artefact()).tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_chat_says_what_a_conversation_says(server: Running) -> None:
    (want,) = answers("the cat", system="be kind")
    whole = ask(server, said("the cat", system="be kind"))
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (want, "length")
    prompt = len(encode("<s>[system] be kind\n[user] the cat\n[assistant]"))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 12)
    assert whole.usage.total_tokens == prompt + 12

    parts = list(ask(server, said("the cat", system="be kind"), stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == want
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts[-3:-1]] == [None, "length"]
    assert parts[-1].usage == whole.usage
    assert len(parts) > 5


@pytest.mark.parametrize("name", ["anna", None])
def test_the_next_turn_reads_only_what_is_new(server: Running, name: str | None) -> None:
    first, second, third = answers("hello", "the dog", "the mat")
    one = ask(server, said("hello"), name)
    two = ask(server, said("hello", first, "the dog"), name)
    three = ask(server, said("hello", first, "the dog", second, "the mat"), name)
    assert [reply.choices[0].message.content for reply in (one, two, three)] == [first, second, third]
    usage = two.usage
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens == len(
        encode("\n[user] the dog\n[assistant]")
    )
    assert usage.prompt_tokens_details.cached_tokens == one.usage.total_tokens
    assert three.usage.prompt_tokens_details.cached_tokens == two.usage.total_tokens


def test_other_earlier_messages_are_read_anew(server: Running) -> None:
    (first,) = answers("the cat")
    ask(server, said("the cat"), "bert")
    changed = ask(server, said("the cat", first + "!", "the dog"), "bert")
    assert changed.usage.prompt_tokens_details.cached_tokens == 0
    fresh = ask(server, said("the cat", first + "!", "the dog"), "carla")
    assert changed.choices[0].message.content == fresh.choices[0].message.content
    assert ask(server, said("the dog"), "bert").choices[0].message.content == answers("the dog")[0]


def test_conversations_side_by_side_do_not_mix(server: Running) -> None:
    words = {"x": ["the cat", "sat", "on"], "y": ["the dog", "log", "the mat"]}
    got: dict[str, list[str]] = {}

    def talk(name: str) -> None:
        history: list[str] = []
        for word in words[name]:
            history.append(word)
            headers = {"X-Conversation-Id": name}
            reply = ask(server, said(*history), extra_headers=headers)
            history.append(reply.choices[0].message.content)
            if len(history) > 2:
                assert reply.usage.prompt_tokens_details.cached_tokens > 0
        got[name] = history[1::2]

    threads = [threading.Thread(target=talk, args=(name,)) for name in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {name: answers(*texts) for name, texts in words.items()}


def test_completions_sampling_and_stops(server: Running) -> None:
    artefact = Artefact.load(text_artefact())
    assert artefact.tokenizer is not None
    session = Session.open(artefact, "onnx", 1)
    session.feed(artefact.tokenizer.encode("the cat"))
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7)
    want = "".join(piece.text for piece in session.generate(24, params))

    settings: dict[str, Any] = {"model": MODEL, "prompt": "the cat", "temperature": 0.8, "top_p": 0.9, "seed": 7}
    create = server.client.completions.create
    whole = create(**settings, max_tokens=24)
    assert whole.choices[0].text == want
    parts = list(create(**settings, max_tokens=24, stream=True))
    assert "".join(part.choices[0].text for part in parts) == want
    stop = want[len(want) // 2 :][:3]
    cut = create(**settings, max_tokens=24, stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (want[: want.index(stop)], "stop")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n": 2}, "n is 2: Input should be less than or equal to 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported: leave it out; allowed"),
        ({"response_format": {"type": "xml"}}, "does not match any of the expected tags: 'text', 'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema is missing"),
        ({"response_format": schema_format({"type": "thing"})}, "the JSON schema cannot be used: Invalid type: thing"),
        (
            {"response_format": schema_format({"not": {}})},
            'the JSON schema cannot be used: Unimplemented keys: ["not"]',
        ),
        (
            {"response_format": schema_format({}, extra=1)},
            "extra is not supported: leave it out; allowed are name, schema",
        ),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"extra_body": {"tempurature": 1}}, "tempurature is not supported"),
        ({"temperature": -1}, "temperature is -1.0, but must be 0"),
        ({"top_p": 0}, "top-p is 0.0, but must be above 0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_completion_tokens": 3}, "max_tokens and max_completion_tokens differ"),
        ({"stop": ""}, "at least 1 character"),
        ({"messages": said("hi", "ho")}, "the last message must be of role user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(server: Running, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(server, **{"messages": said("hi"), **settings})
    assert told in found.value.body["message"]  # type: ignore[index]
    assert found.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_neutral_values_are_taken(server: Running) -> None:
    ask(server, said("hi"), n=1, frequency_penalty=0, presence_penalty=0, response_format={"type": "text"}, stop=None)


def test_models_health_metrics_and_unknown_paths(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here; use 'small'"):
        server.client.completions.create(model="gpt", prompt="x")
    assert httpx.get(f"{server.url}/healthz").json() == {
        "status": "ok",
        "sessions": 2,
        "busy": 0,
        "waiting": 0,
    }

    def made() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("trimkv_completion_tokens_total")))

    before = made()
    ask(server, said("hi"))
    assert made() == before + 12
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert (missing.status_code, "/v1/chat/completions" in missing.json()["error"]["message"]) == (404, True)
    broken = httpx.post(f"{server.url}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["message"]) == (400, "the body is not JSON: send a JSON object")


def test_all_busy_is_503_and_a_client_that_leaves_frees_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1, waiting=0) as server:
        slow(server, monkeypatch)
        stream = ask(server, said("the cat"), "anna", max_tokens=10**6, stream=True)
        next(iter(stream))
        for name, told in (("anna", "'anna' is being answered"), ("bert", "all 1 sessions are busy")):
            with pytest.raises(openai.InternalServerError) as found:
                ask(server, said("the cat"), name)
            assert (found.value.status_code, found.value.response.headers["retry-after"]) == (503, "1")
            assert told in found.value.message
        stream.close()
        assert until(lambda: server.pool.busy == 0, 0.5)
        with pytest.raises(openai.APITimeoutError):
            ask(server, said("the cat"), max_tokens=10**6, timeout=0.4)
        assert until(lambda: server.pool.busy == 0, 0.5)
        assert ask(server, said("the cat"), "bert").choices[0].message.content == answers("the cat")[0]


def test_an_answer_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1, timeout=0.3) as server:
        slow(server, monkeypatch)
        with pytest.raises(openai.InternalServerError, match="longer than the server allows") as found:
            ask(server, said("the cat"), max_tokens=10**6)
        assert found.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(ask(server, said("the cat"), max_tokens=10**6, stream=True))
        assert server.pool.busy == 0


def test_without_the_key_nobody_gets_in() -> None:
    with running(1, api_key="secret") as server:
        assert ask(server, said("the cat")).choices[0].message.content == answers("the cat")[0]
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            ask(server._replace(client=server.client.with_options(api_key="wrong")), said("the cat"))
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/healthz").status_code == 200
