"""What can be asked of an answer beside its text: a JSON schema, and how likely its tokens were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from running_server import MODEL, Running, ask, running, said
from text_artefact import text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["kind", "legs", "names"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stream", [False, True])
def test_json_follows_its_schema(server: Running, seed: int, stream: bool) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "stream": stream}
    settings["response_format"] = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    reply = ask(server, said("a pet"), f"pet{seed}", **settings)
    if stream:
        parts = list(reply)
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        finish = parts[-1].choices[0].finish_reason
    else:
        text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert finish == "stop"
    pet = json.loads(text)
    assert list(pet) == ["kind", "legs", "names"]
    assert pet["kind"] in ("cat", "dog")
    assert isinstance(pet["legs"], int)
    assert 0 <= pet["legs"] <= 99
    assert len(pet["names"]) <= 2
    assert all(isinstance(name, str) and len(name) <= 5 for name in pet["names"])


def test_any_json_object(server: Running) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 400}
    reply = ask(server, said("a pet"), response_format={"type": "json_object"}, **settings)
    text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text.startswith("{")
    assert finish == "length" or isinstance(json.loads(text), dict)


def expected(prompt: str, count: int) -> list[tuple[int, np.ndarray]]:
    """Tokens of the greedy answer and all log-probabilities at their places, from a session of its own."""
    artefact = Artefact.load(text_artefact())
    assert artefact.tokenizer is not None
    session = Session.open(artefact, "onnx", 1)
    session.feed(artefact.tokenizer.encode(prompt, add_special_tokens=not prompt.startswith("<s>")))
    found = []
    for piece in session.generate(count):
        assert session.logits is not None
        logits = session.logits.astype(np.float64)
        found.append((piece.token, logits - np.log(np.exp(logits).sum())))
    return found


def test_log_probabilities_of_chats(server: Running) -> None:
    whole = ask(server, said("the cat"), logprobs=True, top_logprobs=3, temperature=0)
    content = whole.choices[0].logprobs.content
    want = expected("<s>[user] the cat\n[assistant]", 12)
    assert len(content) == 12
    for entry, (token, table) in zip(content, want, strict=True):
        assert entry.logprob == pytest.approx(table[token], abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(np.sort(table)[::-1][:3], abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    parts = list(ask(server, said("the cat"), logprobs=True, top_logprobs=3, stream=True))
    streamed = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert streamed == content
    plain = ask(server, said("the cat"), logprobs=True)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 12
    assert ask(server, said("the cat")).choices[0].logprobs is None


def test_log_probabilities_of_completions(server: Running) -> None:
    create, settings = server.client.completions.create, {"model": MODEL, "prompt": "the cat", "max_tokens": 8}
    found = create(**settings, logprobs=2).choices[0].logprobs  # type: ignore[call-overload]
    want = expected("the cat", 8)
    assert found.token_logprobs == pytest.approx([table[token] for token, table in want], abs=1e-4)
    for top, (_, table) in zip(found.top_logprobs, want, strict=True):
        # Tokens that are parts of characters have the same text, so OpenAI's form can show one of them only.
        best = np.sort(table)[::-1][:2]
        assert all(np.abs(best - value).min() < 1e-4 for value in top.values())
        assert 1 <= len(top) <= 2
    assert found.text_offset == [sum(map(len, found.tokens[:index])) for index in range(8)]
    parts = [part.choices[0].logprobs for part in create(**settings, logprobs=2, stream=True)]  # type: ignore[call-overload]
    assert [offset for part in parts if part for offset in part.text_offset] == found.text_offset
