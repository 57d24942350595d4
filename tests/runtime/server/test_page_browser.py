"""The page in a real browser, over a real server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from browser import browser_page
from running_server import Running, answers, running, slow, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


def say(page: Any, text: str, count: int = 12) -> None:
    """Asks through the keyboard and waits for the answer's cost."""
    told = page.locator(".said.assistant .cost")
    before = told.count()
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value }", str(count))
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    told.nth(before).wait_for()


def words(page: Any, kind: str) -> list[str]:
    texts: list[str] = page.locator(f".said.{kind} .words").all_text_contents()
    return texts


def test_a_chat_and_its_memory(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        assert page.locator("#entries").text_content() == "nothing was read yet"
        say(page, "the cat")
        say(page, "the dog")
        assert words(page, "user") == ["the cat", "the dog"]
        assert words(page, "assistant") == answers("the cat", "the dog")
        costs = page.locator(".said.assistant .cost").all_text_contents()
        found = [re.match(r"read (\d+) new tokens, (\d+) were held", cost) for cost in costs]
        assert [bool(cost and int(cost[2])) for cost in found] == [False, True]

        name = page.evaluate("chat.id")
        view = httpx.get(f"{server.url}/memory", params={"conversation": name}).json()
        assert page.locator("#bar").get_attribute("aria-valuenow") == str(view["live_entries"])
        entries = (
            f"{view['live_entries']} of {view['max_entries']} entries in each head, after {view['position']} tokens"
        )
        assert page.locator("#entries").text_content() == entries
        assert len(page.locator("#text .t").all()) == len(view["tokens"])
        told = page.locator("#text .t").first.get_attribute("data-tells")
        assert told == f"position {view['tokens'][0][0]}: held by {100 * view['tokens'][0][2]:.0f} % of the heads"

        # Switches.
        cells = page.locator("#heads td").all_text_contents()
        assert cells == [str(value) for row in view["entries"] for value in row]
        page.locator("input[value=mean_age]").check(force=True)
        ages = page.locator("#heads td").all_text_contents()
        assert ages == [str(int(value + 0.5)) for row in view["mean_age"] for value in row]
        gaps = page.locator("#text .gap").count()
        page.locator("#gaps").uncheck()
        assert page.locator("#text .gap").count() == 0 < gaps

        # It survives a reload, and a new chat is new.
        page.reload()
        assert words(page, "assistant") == answers("the cat", "the dog")
        page.get_by_role("button", name="New chat").click()
        assert words(page, "user") == []
        say(page, "the cat")
        assert words(page, "assistant") == answers("the cat")
        assert troubles == []


def test_stop_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(1) as server, browser_page() as (page, troubles):
        slow(server, monkeypatch)
        page.goto(server.url)
        page.locator("#message").fill("the cat")
        page.get_by_role("button", name="Send").click()
        assert until(lambda: len(words(page, "assistant")[0]) > 4)
        assert until(lambda: int(page.locator("#bar").get_attribute("aria-valuenow") or 0) > 0)  # while it answers
        page.get_by_role("button", name="Stop").click()
        page.locator(".said.assistant .cost", has_text="stopped").wait_for()
        assert until(lambda: server.pool.busy == 0)
        assert page.locator("#send").is_enabled()
        assert troubles == []


def test_the_keyboard_is_enough(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        page.keyboard.type("the cat")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("sat")
        page.keyboard.press("Enter")
        page.locator(".said.assistant .cost").wait_for()
        assert words(page, "user") == ["the cat\nsat"]
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        assert {"new", "log", "message", "send", "heads", "gaps", "text"} <= reached
        page.locator("#text").focus()
        page.keyboard.press("ArrowRight")
        assert "position" in (page.locator("#token").text_content() or "")
        assert troubles == []


def test_everything_has_a_name(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, button, [tabindex], canvas, [role=progressbar]")]
            .filter((node) => !(node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim()))
            .map((node) => node.outerHTML)"""
        )
        assert nameless == []
        assert page.locator("#log").get_attribute("aria-live") == "polite"
        assert page.evaluate("document.documentElement.lang") == "en"
        assert troubles == []


def test_text_is_never_taken_for_html(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
    for slot in server.pool.slots:
        real = slot.answer

        def answer(*args: Any, real: Callable[..., Any] = real) -> Iterator[Any]:
            for part in real(*args):
                yield part._replace(text=evil)

        monkeypatch.setattr(slot, "answer", answer)
    with browser_page() as (page, troubles):
        page.goto(server.url)
        say(page, evil, 1)
        assert words(page, "user") == [evil]
        assert words(page, "assistant")[0].startswith(evil)
        assert page.evaluate("window.hit") is None
        assert page.locator("#log img").count() == 0
        assert troubles == []


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide(server: Running, width: int, scheme: str) -> None:
    with browser_page(viewport={"width": width, "height": 800}, color_scheme=scheme) as (page, troubles):
        page.goto(server.url)
        say(page, "a word that is as long as " + "x" * 300)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert troubles == []


def test_the_key_is_asked_for() -> None:
    with running(1, api_key="secret") as server, browser_page() as (page, troubles):
        page.goto(server.url)
        page.locator("#message").fill("the cat")
        page.locator("#message").press("Enter")
        page.get_by_role("alert").filter(has_text="API key is missing or wrong").wait_for()
        page.get_by_label("API key").fill("secret")
        page.locator("#max-tokens").fill("12")
        page.get_by_role("button", name="Retry").click()
        page.locator(".said.assistant .cost").wait_for()
        assert words(page, "assistant") == answers("the cat")
        # The browser itself notes each answer with status 401.
        assert all("401" in trouble for trouble in troubles)


def test_what_the_server_refuses_is_told(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        page.get_by_text("Settings").click()
        page.locator("#temperature").fill("-1")
        page.locator("#message").fill("the cat")
        page.locator("#message").press("Enter")
        page.get_by_role("alert").filter(has_text="temperature is -1.0, but must be 0").wait_for()
        page.locator("#temperature").fill("0")
        page.locator("#max-tokens").fill("12")
        page.get_by_role("button", name="Retry").click()
        page.locator(".said.assistant .cost").wait_for()
        assert words(page, "assistant") == answers("the cat")
        assert all("400" in trouble or "404" in trouble for trouble in troubles)
