"""The page at ``/``: a chat, and beside it what its cache holds."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from html import escape
from importlib.resources import files
from string import Template
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse, Response

from trimkv_edge.runtime.server.errors import body_of
from trimkv_edge.runtime.server.memory_view import memory_view
from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.server.slot import Slot
from trimkv_edge.runtime.session import Session

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PRIVATE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def add_page(app: FastAPI, pool: SlotPool, model: str, needs_key: bool) -> None:
    """Adds the page, its script and style, and ``GET /memory?conversation=ID``, which tells what a chat's cache holds.

    Args:
        app: gets the routes.
        pool: has the sessions.
        model: name that the page asks for.
        needs_key: the page asks people for the key.
    """
    settings = escape(json.dumps({"model": model, "needsKey": needs_key}))
    html = Template(_asset("index.html")).substitute(model=escape(model), settings=settings)

    async def memory(conversation: Annotated[str, Query(min_length=1, max_length=200)]) -> Response:
        slot = pool.find(conversation)
        view = None if slot is None else await asyncio.wrap_future(slot.look(partial(_view, slot, conversation)))
        if view is None:
            message = (
                f"no session holds conversation {conversation[:80]!r}: it was not begun, or another one took its place"
            )
            return JSONResponse(body_of(message, 404, "no_session", "conversation"), 404, _PRIVATE)
        return JSONResponse(view, headers=_PRIVATE)

    app.get("/memory")(memory)
    for path, text, kind in (
        ("/", html, "text/html"),
        ("/page.js", _asset("page.js"), "text/javascript"),
        ("/page.css", _asset("page.css"), "text/css"),
    ):
        app.get(path, include_in_schema=False)(_file(text, kind))


def _view(slot: Slot, conversation: str, session: Session) -> dict[str, Any] | None:
    # Until the look's turn came the slot may have passed to another chat, whose text is none of this one's business;
    # and a slot just claimed holds the chat before until its answer begins.
    return memory_view(session) if slot.conversation == slot.read_for == conversation else None


def _file(text: str, kind: str) -> Any:
    async def send() -> Response:
        return Response(text, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    return send


def _asset(name: str) -> str:
    return files(__package__).joinpath("web", name).read_text(encoding="utf-8")
