"""Who and what is let in: ASGI layers that look at headers and count bytes, nothing else."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimkv_edge.runtime.server.errors import body_of

# A page loads before it can ask for the key.
_OPEN = frozenset({"/healthz", "/", "/page.css", "/page.js"})
LARGEST_BODY, LARGEST_BODY_WITH_PICTURES = 8 * 2**20, 48 * 2**20


class KeyGuard:
    """Lets nobody in without the key, except to what tells nothing.

    Args:
        app: what is guarded.
        key: the bearer token.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._want = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._want):
                message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
                await _refuse(scope, receive, send, message, 401, "invalid_api_key")
                return
        await self._app(scope, receive, send)


class LocalGuard:
    """Keeps web pages of other sites away from a server without a key.

    A browser on this machine can reach it, and sends what any page wants: the page's ``Origin`` gives that away, and
    after a name that was made to point here (DNS rebinding) the ``Host`` does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if not is_loopback(_name(f"//{host}")):
                message = f"the host {host[:80]!r} is not this machine's own: use 127.0.0.1 or localhost"
                await _refuse(scope, receive, send, message, 403, "forbidden_host")
                return
            if origin and origin != f"http://{host}":
                message = f"pages of {origin[:80]!r} may not use this server: start it with --api-key-env"
                await _refuse(scope, receive, send, message, 403, "forbidden_origin")
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than ``LARGEST_BODY`` bytes, told or not.

    Args:
        app: what is guarded.
        largest: most bytes.
    """

    def __init__(self, app: ASGIApp, largest: int = LARGEST_BODY) -> None:
        self._app, self._largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self._largest:
            await self._too_large(scope, receive, send)
            return
        left, refused = self._largest, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # What reads the body takes this for a client that went away.
            return message if left >= 0 else {"type": "http.disconnect"}

        async def answer(message: Message) -> None:
            nonlocal refused
            if left >= 0:
                await send(message)
            elif not refused:
                refused = True
                await self._too_large(scope, receive, send)

        try:
            await self._app(scope, counted, answer)
        except Exception:
            if left >= 0:
                raise
            if not refused:
                await self._too_large(scope, receive, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than {self._largest} bytes: send less"
        await _refuse(scope, receive, send, message, 413, "request_too_large")


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _refuse(scope: Scope, receive: Receive, send: Send, message: str, status: int, code: str) -> None:
    await JSONResponse(body_of(message, status, code), status)(scope, receive, send)
