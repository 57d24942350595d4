"""The page in a real browser, over a real server."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from browser import browser_page
from running_server import Running, answers, ask, running, said, slow, until

from trimkv_edge.runtime.server.memory_view import memory_view
from trimkv_edge.runtime.session import Session


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


# Texts with less than 4.5 : 1 against what lies behind them.
FAINT = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((part) => part / 255).map(
      (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest(":disabled, noscript")) continue;
    const both = [light(getComputedStyle(node).color), light(behind(node))].sort((one, two) => two - one);
    const ratio = (both[0] + 0.05) / (both[1] + 0.05);
    if (ratio < 4.5) faint.push([node.outerHTML.slice(0, 80), ratio]);
  }
  return faint;
}"""


def say(page: Any, text: str, count: int = 12) -> None:
    """Asks through the keyboard and waits for the answer's cost."""
    told = page.locator(".said.assistant .cost")
    before = told.count()
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value }", str(count))
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    told.nth(before).wait_for()
    settled(page)


def settled(page: Any) -> None:
    """The answer is over and the memory after it is drawn. Playwright's own wait would need ``eval`` in the page."""
    assert until(lambda: page.evaluate("working === null && looking === null"))


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

        shades = page.locator("#text .t").evaluate_all("(nodes) => nodes.map((node) => node.className)")
        assert shades == [f"t s{math.ceil(share * 5)}" for _, _, share in view["tokens"]]
        held = [position for position, _, _ in view["tokens"]]
        first = next(index for index in range(1, len(held)) if held[index] > held[index - 1] + 1)
        left = (held[first - 1] + 1, held[first] - 1)
        where = f"positions {left[0]} to {left[1]} were" if left[0] < left[1] else f"position {left[0]} was"
        gaps = page.locator("#text .gap").evaluate_all("(nodes) => nodes.map((node) => node.dataset.tells)")
        assert f"{where} evicted everywhere" in gaps
        measured = page.evaluate("curve")
        assert measured[-1] == [view["position"], measured[-1][1]]
        assert all(position > 0 for position, _ in measured), "a point that nobody measured"

        # Switches. Layers side by side, heads below each other.
        cells = page.locator("#heads td").all_text_contents()
        assert cells == [str(value) for head in zip(*view["entries"], strict=True) for value in head]
        page.get_by_text("mean age").click()
        ages = page.locator("#heads td").all_text_contents()
        assert ages == [str(int(value + 0.5)) for head in zip(*view["mean_age"], strict=True) for value in head]
        page.locator("#gaps").uncheck()
        assert page.locator("#text .gap").count() == 0 < len(gaps)

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
        assert page.locator("#log").get_attribute("aria-busy") == "true"
        assert page.locator("#state").text_content() == "answering"
        page.get_by_role("button", name="Stop").click()
        page.locator(".said.assistant .cost", has_text="stopped").wait_for()
        assert until(lambda: server.pool.busy == 0)
        assert page.locator("#send").is_enabled()
        assert page.locator("#log").get_attribute("aria-busy") == "false"
        monkeypatch.undo()
        say(page, "the dog")  # goes on with what it had said
        assert len(words(page, "assistant")) == 2
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
        settled(page)
        reached: list[str] = []
        while "message" not in reached and len(reached) < 30:
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        assert [name for name in reached if name] == ["send", "gaps", "text", "heads", "new", "log", "message"]
        page.get_by_role("group", name="Text").focus()
        newest = page.evaluate("memory.tokens.slice(-2)")
        for key, token in (("ArrowLeft", newest[1]), ("ArrowLeft", newest[0]), ("End", newest[1])):
            page.keyboard.press(key)
            told = f"position {token[0]}: held by {100 * token[2]:.0f} % of the heads"
            assert (page.locator("#token").text_content() or "").endswith(told)
            assert page.locator("#text .chosen").all_text_contents() == [token[1]]
        page.get_by_role("radio", name="entries").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name="mean age").is_checked()
        assert "tokens old" in (page.locator("#heads-scale").text_content() or "")
        assert troubles == []


def test_everything_has_a_name(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll(
                "input, textarea, button, [tabindex], canvas, section, [role=meter]")]
            .filter((node) => !(node.labels?.length || node.ariaLabel || document.getElementById(
                node.getAttribute("aria-labelledby"))?.textContent || (node.tagName === "BUTTON" && node.textContent)))
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
                yield part and part._replace(text=evil)

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
        page.get_by_text("Settings").click()
        page.evaluate("trouble('what went wrong')")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(FAINT) == []
        # As many heads as large models have.
        page.evaluate("memory.entries = Array(48).fill(Array(8).fill(3)); drawMemory()")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("#memory").evaluate("(box) => box.scrollWidth <= box.clientWidth")
        assert page.locator("#heads tbody tr").count() == 8
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
        # The browser itself notes an answer with status 400.
        assert len(troubles) == 1
        assert "400" in troubles[0]


def test_what_got_no_answer_is_asked_again_or_in_other_words() -> None:
    with running(1) as server, browser_page() as (page, _):
        page.goto(server.url)
        page.get_by_text("Settings").click()
        page.locator("#temperature").fill("-1")
        page.locator("#message").fill("the dog")
        page.locator("#message").press("Enter")
        page.get_by_role("alert").wait_for()
        page.reload()
        page.get_by_role("alert").filter(has_text="the last message has no answer yet").wait_for()
        say(page, "the cat")
        assert page.get_by_role("alert").count() == 0
        assert words(page, "user") == ["the cat"]
        assert words(page, "assistant") == answers("the cat")


def test_a_system_prompt_begins_a_chat(server: Running) -> None:
    with browser_page() as (page, troubles):
        page.goto(server.url)
        page.get_by_text("Settings").click()
        page.get_by_label("System prompt").fill("be kind")
        say(page, "the cat")
        say(page, "the dog")
        assert words(page, "assistant") == answers("the cat", "the dog", system="be kind")
        assert troubles == []


def test_a_server_that_is_busy_or_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with browser_page() as (page, troubles):
        with running(1, waiting=0) as server:
            page.goto(server.url)
            slow(server, monkeypatch)
            stream = ask(server, said("the dog"), "anna", max_tokens=10**6, stream=True)
            next(iter(stream))
            page.locator("#message").fill("the cat")
            page.locator("#message").press("Enter")
            alert = page.get_by_role("alert")
            alert.filter(has_text="all 1 sessions are busy").filter(has_text="(in 1 s)").wait_for()
            stream.close()
            monkeypatch.undo()
            assert until(lambda: server.pool.busy == 0)
            page.locator("#max-tokens").evaluate("(field) => { field.value = 12 }")
            page.get_by_role("button", name="Retry").click()
            page.locator(".said.assistant .cost").wait_for()
            assert words(page, "assistant") == answers("the cat")

            # Another chat takes the only session.
            ask(server, said("the dog"), "anna")
            page.reload()
            told = "no session holds this chat now: the next message makes it be read again"
            page.get_by_text(told).wait_for()
            say(page, "the dog")
            assert " 0 were held" in (page.locator(".said.assistant .cost").last.text_content() or "")
            assert page.get_by_text(told).count() == 0
        page.locator("#message").fill("the cat")
        page.locator("#message").press("Enter")
        alert.filter(has_text="the server cannot be reached").wait_for()
        assert all(re.search("503|404|ERR_CONNECTION", trouble) for trouble in troubles)


@pytest.mark.parametrize(("cost", "looks"), [(0.0, range(2, 12)), (1.0, range(1, 2))])
def test_expensive_looks_are_rare(monkeypatch: pytest.MonkeyPatch, cost: float, looks: range) -> None:
    """At most a twentieth of an answer's time goes into looks, and at most four are asked for in a second."""
    asked = 0

    def view(session: Session) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {**memory_view(session), "look_s": cost}

    monkeypatch.setattr("trimkv_edge.runtime.server.page.memory_view", view)
    with running(1) as server, browser_page() as (page, troubles):
        slow(server, monkeypatch)
        page.goto(server.url)
        page.locator("#message").fill("the cat")
        page.locator("#message").press("Enter")
        page.wait_for_timeout(2500)
        assert asked in looks
        page.get_by_role("button", name="Stop").click()
        assert troubles == []
