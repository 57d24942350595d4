"""Debian's Chromium without a window, for tests of pages: what they complain about and what they ask of the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route, WebSocket

REQUIRED = "TRIMKV_REQUIRE_BROWSER"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LOCAL_SCHEMES = ("file", "data", "blob", "about")
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


_running: list[Browser] = []


@contextmanager
def _browser() -> Iterator[Browser]:
    """One for all pages that are open at the same time: Playwright runs once in a thread."""
    if _running:
        yield _running[0]
        return
    chromium = _chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        _running.append(browser)
        try:
            yield browser
        finally:
            _running.clear()
            browser.close()


@contextmanager
def browser_page(**context: object) -> Iterator[tuple[Page, list[str]]]:
    """A page without cookies or history, and the list that its troubles are added to: console errors, errors of
    scripts, and requests that were refused because they leave this machine.

    Without Chromium or Playwright the test is skipped; with ``TRIMKV_REQUIRE_BROWSER=1`` it fails.

    Args:
        context: settings of the page, such as ``viewport={"width": 400, "height": 800}`` or ``color_scheme="dark"``.
    """
    troubles: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            troubles.append(f"console: {message.text}")

    def on_request(route: Route) -> None:
        url = route.request.url
        if _is_local(url):
            route.continue_()
        else:
            troubles.append(f"request: {url}")
            route.abort()

    def on_socket(socket: WebSocket) -> None:
        if not _is_local(socket.url):
            troubles.append(f"request: {socket.url}")

    with _browser() as browser:
        opened = browser.new_context(service_workers="block", **context)  # type: ignore[arg-type]
        try:
            page = opened.new_page()
            page.set_default_timeout(20_000)
            page.route("**/*", on_request)
            page.on("console", on_console)
            page.on("pageerror", lambda error: troubles.append(f"page: {error}"))
            page.on("websocket", on_socket)
            yield page, troubles
        finally:
            opened.close()


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in _LOCAL_SCHEMES or parts.hostname in _LOCAL_HOSTS


def _chromium() -> str:
    missing = None
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        missing = f"this test needs Playwright ({error}): pip install playwright"
    found = shutil.which("chromium", path=f"/usr/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        missing = "this test needs Chromium: apt-get install chromium"
    if missing is not None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    assert found is not None
    return found
