"""What the ASGI layers let in, told by a small application behind them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from trimkv_edge.runtime.server.guards import BodyLimit, KeyGuard, LocalGuard, is_loopback


async def _length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def _client(*layers: Middleware) -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/{path:path}", _length, methods=["GET", "POST"])], middleware=list(layers))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000")


async def _get(client: httpx.AsyncClient, path: str = "/v1/models", **headers: str) -> tuple[int, str]:
    async with client:
        answer = await client.get(path, headers=headers)
    return answer.status_code, answer.text


def run(work: object) -> tuple[int, str]:
    import asyncio

    return asyncio.run(work)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "status", "told"),
    [
        ({}, 200, "0"),
        ({"host": "localhost:8000"}, 200, "0"),
        ({"host": "[::1]:8000"}, 200, "0"),
        ({"origin": "http://127.0.0.1:8000"}, 200, "0"),
        ({"host": "evil.example:8000"}, 403, "forbidden_host"),
        ({"host": "127.0.0.1.evil.example"}, 403, "forbidden_host"),
        ({"host": "[::1"}, 403, "forbidden_host"),
        ({"host": ""}, 403, "forbidden_host"),
        ({"origin": "https://evil.example"}, 403, "forbidden_origin"),
        ({"origin": "null"}, 403, "forbidden_origin"),
        ({"origin": "http://127.0.0.1:9000"}, 403, "forbidden_origin"),
    ],
)
def test_without_a_key_only_this_machines_own_programs_and_page(
    headers: dict[str, str], status: int, told: str
) -> None:
    found, text = run(_get(_client(Middleware(LocalGuard)), **headers))
    assert (found, told in text) == (status, True), text


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", "Bearer secret", 200),
        ("/v1/models", "Bearer secre", 401),
        ("/v1/models", "secret", 401),
        ("/memory", "", 401),
        ("/metrics", "", 401),
        ("/", "", 200),
        ("/page.js", "", 200),
        ("/healthz", "", 200),
        ("/healthz/", "", 401),
    ],
)
def test_the_key(path: str, key: str, status: int) -> None:
    assert run(_get(_client(Middleware(KeyGuard, key="secret")), path, authorization=key))[0] == status


def _body(size: int) -> Iterator[bytes]:
    for _ in range(size // 100):
        yield b"x" * 100


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1100, 413)])
@pytest.mark.parametrize("told", [True, False])
def test_a_body_has_a_limit(size: int, status: int, told: bool) -> None:
    async def post() -> tuple[int, str]:
        async def chunks():  # type: ignore[no-untyped-def]
            for part in _body(size):
                yield part

        async with _client(Middleware(BodyLimit, largest=1000)) as client:
            answer = await client.post("/", content=b"x" * size if told else chunks())
            return answer.status_code, answer.text

    found, text = run(post())
    assert found == status
    assert text == str(size) if status == 200 else "larger than 1000 bytes" in text


def test_loopback_names() -> None:
    hosts = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.com", ""]
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
