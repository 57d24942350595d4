"""The routes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, NamedTuple
from uuid import uuid4

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.server.errors import KeyGuard, body_of, error_body, error_response, status_of
from trimkv_edge.runtime.server.metrics import Metrics
from trimkv_edge.runtime.server.pool import Answer, Prompt, SlotPool
from trimkv_edge.runtime.server.requests import ChatRequest, CompletionRequest, explain
from trimkv_edge.runtime.server.task import Task

_LOG = logging.getLogger(__name__)
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {_CHAT: ChatRequest, _TEXT: CompletionRequest}

Json = dict[str, Any]


class _Form(NamedTuple):
    """How an endpoint words answers: prefix of ids, names of objects, and what a choice holds."""

    prefix: str
    whole: str
    part: str
    first: Json | None  # opens a stream
    choice: Callable[[str], Json]
    delta: Callable[[str], Json]


_CHAT_FORM = _Form(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
)
_TEXT_FORM = _Form(
    "cmpl-", "text_completion", "text_completion", None, lambda text: {"text": text}, lambda text: {"text": text}
)


def make_app(pool: SlotPool, model: str, *, api_key: str | None = None, timeout: float = 300.0) -> FastAPI:
    """The application.

    Args:
        pool: the sessions; who made it closes it.
        model: the name that requests must give.
        api_key: bearer token, asked for everywhere but at ``/healthz``; None: open to all who can connect.
        timeout: most seconds for one answer.

    Raises:
        ConfigError: ``timeout`` is not above 0, or the key is empty.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout is {timeout}, but must be above 0 seconds")
    if api_key == "":
        raise ConfigError("the API key is empty: give at least one character")
    # Its documentation pages would load scripts from elsewhere.
    app = FastAPI(title="trimkv-serve", docs_url=None, redoc_url=None)
    server = _Server(pool, model, timeout)
    if api_key is not None:
        app.add_middleware(KeyGuard, key=api_key)
    app.add_exception_handler(RequestValidationError, server.invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.get("/healthz")(server.health)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name}")(server.one_model)
    app.post(_CHAT, response_model=None)(server.chat)
    app.post(_TEXT, response_model=None)(server.complete)
    return app


class _Server:
    def __init__(self, pool: SlotPool, model: str, timeout: float) -> None:
        self._pool, self._model, self._timeout = pool, model, timeout
        self._created = int(time.time())
        self._metrics = Metrics(pool)
        self._watchers: set[asyncio.Task[None]] = set()

    async def health(self) -> Json:
        return {"status": "ok", "sessions": len(self._pool.slots), "busy": self._pool.busy}

    async def show_metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Json:
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> Response:
        return self._unknown(name) or JSONResponse(self._card())

    async def chat(
        self, request: Request, body: ChatRequest, x_conversation_id: Annotated[str | None, Header()] = None
    ) -> Response:
        name = body.conversation or x_conversation_id or None
        prompt = Prompt(body.sampling(), body.count, body.stops, body.messages)
        return await self._reply(request, body, prompt, _CHAT_FORM, name)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        prompt = Prompt(body.sampling(), body.count, body.stops, text=body.prompt)
        return await self._reply(request, body, prompt, _TEXT_FORM)

    async def invalid(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        self._metrics.count("400")
        message, param = explain(error.errors()[0], _BODIES[request.url.path])
        return JSONResponse(body_of(message, 400, "invalid_value", param), 400)

    def _card(self) -> Json:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "trimkv-edge"}

    def _unknown(self, name: str) -> Response | None:
        if name == self._model:
            return None
        message = f"model {name!r} is not served here; use {self._model!r}"
        return JSONResponse(body_of(message, 404, "model_not_found", "model"), 404)

    async def _reply(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        prompt: Prompt,
        form: _Form,
        conversation: str | None = None,
    ) -> Response:
        if unknown := self._unknown(body.model):
            self._metrics.count("404")
            return unknown
        try:
            task = Task(self._pool, self._pool.claim(conversation, prompt.earlier), prompt, self._timeout)
        except Exception as error:
            return self._failed(error)
        self._watch(request, task)
        pieces = self._counted(task)
        try:
            # Failures before the first token have a status of their own, also in a stream.
            first = await anext(pieces)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return StreamingResponse(self._events(first, pieces, task, form, usage), media_type="text/event-stream")
            async for _ in pieces:
                pass
        except Exception as error:
            return error_response(error)
        answer = task.answer
        choice = form.choice("".join(answer.text)) | {"index": 0, "logprobs": None, "finish_reason": answer.finish}
        return JSONResponse(self._head(form.prefix, form.whole) | {"choices": [choice], "usage": _usage(answer)})

    def _watch(self, request: Request, task: Task) -> None:
        async def watch() -> None:
            # Comes at the end of every request; then there is nothing left to stop.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            task.stop()

        watcher = asyncio.create_task(watch())
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _counted(self, task: Task) -> AsyncIterator[str]:
        outcome = "stopped"
        try:
            async for text in task.pieces():
                yield text
            outcome = "ok"
        except Exception as error:
            outcome = str(self._status(error))
            raise
        finally:
            task.stop()
            self._metrics.count(outcome, task.answer)

    def _failed(self, error: Exception) -> Response:
        self._metrics.count(str(self._status(error)))
        return error_response(error)

    def _status(self, error: Exception) -> int:
        status, _ = status_of(error)
        if status == 500:
            _LOG.error("a request failed", exc_info=error)
        return status

    async def _events(
        self, first: str, pieces: AsyncIterator[str], task: Task, form: _Form, usage: bool
    ) -> AsyncIterator[str]:
        head = self._head(form.prefix, form.part)

        def event(choice: Json, finish: str | None = None) -> str:
            return _event(head | {"choices": [{"index": 0, "logprobs": None, **choice, "finish_reason": finish}]})

        try:
            if form.first is not None:
                yield event(form.first)
            if first:
                yield event(form.delta(first))
            async for text in pieces:
                if text:
                    yield event(form.delta(text))
            yield event(form.delta(""), task.answer.finish)
            if usage:
                yield _event(head | {"choices": [], "usage": _usage(task.answer)})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(error_body(error))
        finally:
            task.stop()

    def _head(self, prefix: str, kind: str) -> Json:
        return {"id": prefix + uuid4().hex, "object": kind, "created": int(time.time()), "model": self._model}


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = f"/v1/models, {_CHAT}, {_TEXT}, /healthz, /metrics"
    message = f"{request.method} {request.url.path}: {error.detail}; there are {paths}"
    return JSONResponse(body_of(message, error.status_code), error.status_code, error.headers)


def _usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
