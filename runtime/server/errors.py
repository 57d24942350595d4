"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from trimkv_edge.errors import ArtefactError, ConfigError, PositionLimitError
from trimkv_edge.runtime.server.pool import BusyError
from trimkv_edge.runtime.server.waiting import DeadlineError, StoppedError

_KNOWN: tuple[tuple[type[Exception], int, str], ...] = (
    (BusyError, 503, "busy"),
    (DeadlineError, 504, "timeout"),
    (StoppedError, 499, "stopped"),
    (PositionLimitError, 400, "context_length_exceeded"),
    (ArtefactError, 400, "unsupported"),
    (ConfigError, 400, "invalid_value"),
)


def status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and code."""
    return next(((status, code) for kind, status, code in _KNOWN if isinstance(error, kind)), (500, "internal_error"))


def body_of(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: BaseException) -> dict[str, Any]:
    """The object for an exception; mistakes of the program do not show their text."""
    status, code = status_of(error)
    return body_of("internal error: see the server's log" if status == 500 else str(error), status, code)


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that failed."""
    status, _ = status_of(error)
    headers = {"Retry-After": str(error.retry_s)} if isinstance(error, BusyError) else None
    return JSONResponse(error_body(error), status, headers)
