"""The routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.constraint import Constraint, Grammars
from trimkv_edge.runtime.server.errors import body_of, error_body, error_response, status_of
from trimkv_edge.runtime.server.guards import (
    LARGEST_BODY,
    LARGEST_BODY_WITH_PICTURES,
    BodyLimit,
    KeyGuard,
    LocalGuard,
)
from trimkv_edge.runtime.server.metrics import Metrics
from trimkv_edge.runtime.server.page import add_page
from trimkv_edge.runtime.server.pictures import PictureSource
from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.server.prompt import Part, Prompt
from trimkv_edge.runtime.server.requests import ChatRequest, CompletionRequest, explain
from trimkv_edge.runtime.server.task import Task
from trimkv_edge.runtime.server.waiting import Client, Line
from trimkv_edge.runtime.server.wording import Json, Wording, event

_LOG = logging.getLogger(__name__)
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {_CHAT: ChatRequest, _TEXT: CompletionRequest}


def make_app(
    pool: SlotPool,
    model: str,
    *,
    grammars: Grammars | None = None,
    pictures: PictureSource | None = None,
    api_key: str | None = None,
    timeout: float = 300.0,
    waiting: int = 64,
) -> FastAPI:
    """The application.

    Args:
        pool: the sessions; who made it closes it.
        model: the name that requests must give.
        grammars: for answers that follow a schema; None: such requests are refused.
        pictures: where requests may take them from; None: the model reads text only.
        api_key: bearer token, asked for everywhere but where nothing is told; None: open to all programs that can
            connect, but not to web pages of other sites.
        timeout: most seconds for one answer, waiting included.
        waiting: most requests that wait for a session.

    Raises:
        ConfigError: ``timeout`` is not above 0, ``waiting`` is below 0, or the key is empty.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout is {timeout}, but must be above 0 seconds")
    if api_key == "":
        raise ConfigError("the API key is empty: give at least one character")
    # Its documentation pages would load scripts from elsewhere.
    app = FastAPI(title="trimkv-serve", docs_url=None, redoc_url=None)
    server = _Server(pool, model, grammars, pictures or PictureSource(), timeout, waiting)
    app.add_middleware(BodyLimit, largest=LARGEST_BODY if pictures is None else LARGEST_BODY_WITH_PICTURES)
    if api_key is None:
        app.add_middleware(LocalGuard)
    else:
        app.add_middleware(KeyGuard, key=api_key)
    app.add_exception_handler(RequestValidationError, server.invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.get("/healthz")(server.health)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name}")(server.one_model)
    app.post(_CHAT, response_model=None)(server.chat)
    app.post(_TEXT, response_model=None)(server.complete)
    add_page(app, pool, model, api_key is not None)
    return app


class _Server:
    def __init__(
        self,
        pool: SlotPool,
        model: str,
        grammars: Grammars | None,
        pictures: PictureSource,
        timeout: float,
        waiting: int,
    ) -> None:
        self._pool, self._model, self._grammars, self._timeout = pool, model, grammars, timeout
        self._pictures = pictures
        self._created = int(time.time())
        self._line = Line(pool, waiting)
        self._metrics = Metrics(pool, self._line)
        self._watchers: set[asyncio.Task[None]] = set()

    async def health(self) -> Json:
        return {
            "status": "ok",
            "sessions": len(self._pool.slots),
            "busy": self._pool.busy,
            "waiting": len(self._line),
        }

    async def show_metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Json:
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> Response:
        return self._unknown(name) or JSONResponse(self._card())

    async def chat(
        self, request: Request, body: ChatRequest, x_conversation_id: Annotated[str | None, Header()] = None
    ) -> Response:
        return await self._reply(request, body, body.conversation or x_conversation_id or None)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        return await self._reply(request, body, None)

    async def invalid(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        self._metrics.count("400")
        message, param = explain(error.errors()[0], _BODIES.get(request.url.path, ChatRequest))
        return JSONResponse(body_of(message, 400, "invalid_value", param), 400)

    def _card(self) -> Json:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "trimkv-edge"}

    def _unknown(self, name: str) -> Response | None:
        if name == self._model:
            return None
        message = f"model {name!r} is not served here; use {self._model!r}"
        return JSONResponse(body_of(message, 404, "model_not_found", "model"), 404)

    async def _reply(
        self, request: Request, body: ChatRequest | CompletionRequest, conversation: str | None
    ) -> Response:
        if unknown := self._unknown(body.model):
            self._metrics.count("404")
            return unknown
        deadline = time.monotonic() + self._timeout
        client = self._watch(request, body.user or conversation)
        try:
            prompt = await self._prompt(body)
            slot = await self._line.claim(client, conversation, prompt.earlier, deadline - time.monotonic())
            task = Task(self._pool, slot, prompt, deadline)
        except Exception as error:
            self._metrics.count(str(self._status(error)))
            return error_response(error)
        client.when_gone(task.stop)
        wording = Wording(isinstance(body, ChatRequest), self._model, int(time.time()), prompt.logprobs is not None)
        parts = self._counted(task)
        try:
            # Failures before the first token have a status of their own, also in a stream.
            first = await anext(parts)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                events = _events(first, parts, task, wording, usage)
                return StreamingResponse(events, media_type="text/event-stream")
            async for _ in parts:
                pass
        except Exception as error:
            return error_response(error)
        return JSONResponse(wording.whole(task.answer))

    async def _prompt(self, body: ChatRequest | CompletionRequest) -> Prompt:
        sampling, count, stops = body.sampling(), body.count, body.stops
        if isinstance(body, CompletionRequest):
            return Prompt(sampling, count, stops, text=body.prompt, logprobs=body.logprobs)
        constraint: Constraint | None = None
        if body.schema_wanted is not None:
            if self._grammars is None:
                raise ConfigError("response_format: this server cannot hold answers to a schema: leave it out")
            # Large schemas take a moment.
            constraint = await asyncio.to_thread(self._grammars.of_schema, body.schema_wanted)
        # So do pictures.
        gallery = await asyncio.to_thread(self._pictures.gallery, body.messages)
        return Prompt(
            sampling, count, stops, body.messages, logprobs=body.alternatives, constraint=constraint, gallery=gallery
        )

    def _watch(self, request: Request, name: str | None) -> Client:
        client = Client(name or (request.client.host if request.client else ""))

        async def watch() -> None:
            # Comes at the end of every request; then there is nothing left to stop.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            client.leave()

        watcher = asyncio.create_task(watch())
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return client

    async def _counted(self, task: Task) -> AsyncIterator[Part]:
        outcome = "stopped"
        try:
            async for part in task.parts():
                yield part
            outcome = "ok"
        except Exception as error:
            outcome = str(self._status(error))
            raise
        finally:
            task.stop()
            self._metrics.count(outcome, task.answer)

    def _status(self, error: Exception) -> int:
        status, _ = status_of(error)
        if status == 500:
            _LOG.error("a request failed", exc_info=error)
        return status


async def _events(
    first: Part, parts: AsyncIterator[Part], task: Task, wording: Wording, usage: bool
) -> AsyncIterator[str]:
    stream = wording.stream()
    try:
        yield stream.opening() + stream.part(first)
        async for part in parts:
            if said := stream.part(part):
                yield said
        yield stream.closing(task.answer, usage)
    except Exception as error:
        yield event(error_body(error))
    finally:
        task.stop()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = f"/v1/models, {_CHAT}, {_TEXT}, /healthz, /metrics, /memory, and / for people"
    message = f"{request.method} {request.url.path}: {error.detail}; there are {paths}"
    return JSONResponse(body_of(message, error.status_code), error.status_code, error.headers)
