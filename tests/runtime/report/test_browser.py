"""The page in a real browser: no complaints, the recording's numbers, switches that work, text that can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import browser_page
from recorded_stream import random_recording, recorded
from report_browser import CONTRAST, move, open_page, until

from trimkv_edge.runtime.report.page import About, build_page
from trimkv_edge.runtime.report.text import TokenText

if TYPE_CHECKING:
    from playwright.sync_api import Page

LIFETIMES = recorded().recording.lifetimes
TOKENS = LIFETIMES.tokens


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(recorded().page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def shared(file: str) -> Iterator[tuple[Page, list[str]]]:
    with browser_page(viewport={"width": 1400, "height": 1000}) as (page, troubles):
        yield page, troubles


@pytest.fixture
def report(shared: tuple[Page, list[str]], file: str) -> Iterator[Page]:
    """The page, freshly opened; it has to end without a complaint."""
    opened, troubles = shared
    open_page(opened, file)
    yield opened
    assert troubles == []


def classes(page: Page) -> list[str]:
    """Of every token, in order."""
    script = "ready.then((page) => Array.from({length: page.run.tokens}, (_, p) => page.text.span(p).className))"
    found: list[str] = page.evaluate(script)
    return found


def held_at(seen: int, rows: list[int] | None = None) -> list[int]:
    """How many of the heads hold each token, counted from the table."""
    table = LIFETIMES.left.reshape(-1, TOKENS).tolist()
    chosen = table if rows is None else [table[row] for row in rows]
    return [sum(row[position] > seen for row in chosen) if position < seen else -1 for position in range(TOKENS)]


def test_the_text_is_there_and_does_nothing(report: Page) -> None:
    assert report.title() == 'a "name" <b>&</b>: what the cache holds'
    assert report.locator("h1").inner_text() == 'a "name" <b>&</b>'
    assert report.locator("#notes").inner_text() == "a <note>"
    assert report.locator("main b, main i:not([style]), dd i").count() == 1  # the token's number
    texts = report.evaluate("ready.then((page) => page.run.data.text)")
    assert texts == [text.text for text in recorded().texts]
    assert "</script><script>alert(1)</script><!--" in report.locator("#text").inner_text()


@pytest.mark.parametrize(("layer", "head"), [(-1, -1), (1, -1), (-1, 0), (0, 1)])
def test_its_numbers_are_those_of_the_table(report: Page, layer: int, head: int) -> None:
    rows = [row for row in range(4) if layer in (-1, row // 2) and head in (-1, row % 2)]
    part = type(LIFETIMES)(LIFETIMES.left.reshape(1, 4, TOKENS)[:, rows], LIFETIMES.events, tuple(range(len(rows))))
    script = """async ([rows, seens, size]) => {
      const {run} = await ready;
      const all = (found) => Object.fromEntries(Object.entries(found).map(([k, v]) => [k, [...v]]));
      const raster = run.raster(rows, size);
      return {
        survival: [...run.survival(rows)].slice(1), departures: all(run.departures(rows)),
        holders: seens.map((seen) => [...run.holders(seen, rows)].slice(0, seen)),
        stays: seens.map((seen) => [...run.stays(seen, rows)].slice(0, seen)),
        census: seens.map((seen) => all(run.census(seen))),
        raster: [...raster.table].map((share) => (Number.isNaN(share) ? -1 : share)),
      };
    }"""
    seens = [1, 23, 24, 25, TOKENS // 2, TOKENS]
    found: dict[str, Any] = report.evaluate(script, [rows, seens, 50])
    np.testing.assert_allclose(found["survival"], part.survival(range(1, TOKENS + 1))[0], rtol=1e-5)
    departures = part.departures()
    names = {"count": "entries", "low": "low", "median": "median", "high": "high"}
    assert found["departures"] == {name: getattr(departures, theirs).tolist() for name, theirs in names.items()}
    np.testing.assert_allclose(found["raster"], np.nan_to_num(part.raster(50), nan=-1).reshape(-1), atol=1e-5)
    for index, seen in enumerate(seens):
        assert found["holders"][index] == part.holders(seen).tolist()
        stays = np.minimum(part.left[0, :, :seen], seen) - np.arange(seen)
        np.testing.assert_allclose(found["stays"][index], stays.mean(0), rtol=1e-5)
        census = found["census"][index]
        assert census["entries"] == LIFETIMES.occupancy(seen).reshape(-1).tolist()
        np.testing.assert_allclose(census["age"], LIFETIMES.mean_age(seen).reshape(-1), rtol=1e-5)
        np.testing.assert_allclose(census["oldest"], LIFETIMES.oldest_share(seen).reshape(-1), rtol=1e-5)


def test_the_slider_and_the_selectors_shade_the_text(report: Page) -> None:
    for seen, rows in ((TOKENS, None), (100, None), (100, [2, 3]), (100, [3])):
        report.select_option("#layer", "-1" if rows is None else "1")
        report.select_option("#head", "1" if rows == [3] else "-1")
        move(report, seen)
        want = held_at(seen, rows)
        found = classes(report)
        assert [name for name in found if "unread" in name] == [found[p] for p in range(TOKENS) if want[p] < 0]
        assert [("gone" in name, "unread" in name) for name in found] == [(count == 0, count < 0) for count in want]
        assert sum(count == 0 for count in want) > 0
    assert report.locator("#where").inner_text().startswith(f"100 of {TOKENS}, ")
    # As many heads, as much shade.
    report.select_option("#layer", "-1")
    report.select_option("#head", "-1")
    script = "ready.then((page) => Array.from({length: 100}, (_, p) => page.text.span(p).style.background))"
    shades = report.evaluate(script)
    by_count = {count: {shades[p] for p in range(100) if held_at(100)[p] == count} for count in range(5)}
    assert all(len(found) <= 1 for found in by_count.values())
    assert len(set().union(*by_count.values())) == sum(map(len, by_count.values())) >= 4


def test_shade_by_stay_follows_the_time_and_not_the_holders(report: Page) -> None:
    report.get_by_text("how long it stayed").click()
    assert not any("gone" in name for name in classes(report))
    stays = (np.minimum(LIFETIMES.left, TOKENS) - np.arange(TOKENS)).mean((0, 1))
    levels = report.evaluate("ready.then((page) => [...page.text.levels])")
    order = np.argsort(stays, kind="stable")
    assert np.all(np.diff(np.array(levels)[order]) >= 0)
    assert max(levels) > min(levels) >= 0


def test_the_heat_map_has_three_measures_and_chooses_heads(report: Page) -> None:
    move(report, 100)

    def cells() -> list[str]:
        return report.locator("#heat .cell-text").all_text_contents()

    assert cells() == [str(count) for count in LIFETIMES.occupancy(100).reshape(-1)]
    report.get_by_text("mean age", exact=True).click()
    assert cells() == [str(int(age + 0.5)) for age in LIFETIMES.mean_age(100).reshape(-1).tolist()]
    report.get_by_text("from the oldest tenth", exact=True).click()
    shares = [float(cell.split()[0]) / 100 for cell in cells()]
    np.testing.assert_allclose(shares, LIFETIMES.oldest_share(100).reshape(-1), atol=0.006)
    cell = report.locator("#heat rect").nth(2)
    cell.click()
    assert (report.input_value("#layer"), report.input_value("#head")) == ("1", "0")
    assert report.locator("#heat rect.on").count() == 1
    report.locator("#heat rect").nth(2).click()
    assert (report.input_value("#layer"), report.input_value("#head")) == ("-1", "-1")


def test_a_token_says_what_became_of_it(report: Page) -> None:
    move(report, 100)
    left = LIFETIMES.left.reshape(-1, TOKENS)[:, 30].tolist()
    report.evaluate("ready.then((page) => page.text.span(30).scrollIntoView())")
    report.evaluate("ready.then((page) => { page.text.span(30).id = 'thirty'; })")
    report.locator("#thirty").hover()
    title = report.locator("#token .token-title").inner_text()
    assert title.startswith("31 ")
    assert f"held by {sum(end > 100 for end in left)} of 4 heads now" in title
    want = [f"{min(end, 100) - 30}{' ●' if end > 100 else ''}" for end in left]
    found = report.locator("#token td").all_inner_texts()
    assert sorted(found) == sorted(want)
    assert found == [want[0], want[2], want[1], want[3]]  # rows are heads, columns layers


def test_it_works_by_keyboard(report: Page) -> None:
    report.locator("#play").focus()
    for name in ("time", "layer", "head"):
        report.keyboard.press("Tab")
        assert report.evaluate("document.activeElement.id") == name
    report.keyboard.press("Tab")
    assert report.evaluate("document.activeElement.name") == "shade"
    report.locator("#text").focus()
    for _ in range(3):
        report.keyboard.press("ArrowRight")
    report.keyboard.press("ArrowLeft")
    assert report.locator("#token .token-title").inner_text().startswith("3 ")
    report.keyboard.press("Enter")
    until(report, "document.getElementById('time').value === '3'")
    report.keyboard.press("End")
    assert "has not been read yet" in report.locator("#token").inner_text()
    report.locator("#time").focus()
    report.keyboard.press("ArrowRight")
    assert report.input_value("#time") == "4"


def test_play_moves_through_the_stream_and_stops(report: Page) -> None:
    report.get_by_role("button", name="Play").click()
    until(report, "Number(document.getElementById('time').value) > 2")
    assert int(report.input_value("#time")) < TOKENS
    report.get_by_role("button", name="Pause").click()
    at = report.input_value("#time")
    report.wait_for_timeout(200)
    assert report.input_value("#time") == at
    move(report, TOKENS - 2)
    report.get_by_role("button", name="Play").click()
    until(report, f"document.getElementById('time').value === '{TOKENS}'")
    report.get_by_role("button", name="Play").wait_for()


def test_a_click_in_a_chart_moves_the_stream(report: Page) -> None:
    for name in ("#raster .raster-frame", "#counts svg", "#speed svg"):
        move(report, 1)
        report.locator(name).scroll_into_view_if_needed()
        box = report.locator(name).bounding_box()
        assert box is not None
        report.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.4)
        until(report, "Number(document.getElementById('time').value) > 1")
        assert 0.5 * TOKENS < int(report.input_value("#time")) < 0.65 * TOKENS, name


def test_events_and_machine_are_read_out(report: Page) -> None:
    first, last = LIFETIMES.events[0], LIFETIMES.events[-1]
    move(report, int(first) - 1)
    assert report.locator("#departures-readout").inner_text() == f"No event yet: {LIFETIMES.events.size} in all."
    move(report, TOKENS)
    departures = LIFETIMES.departures()
    text = report.locator("#departures-readout").inner_text()
    assert (
        f"Event {LIFETIMES.events.size} of {LIFETIMES.events.size}, at {last} tokens: {departures.entries[-1]}" in text
    )
    assert f"median age {departures.median[-1]} " in text
    entries = LIFETIMES.occupancy(TOKENS).mean()
    assert report.locator("#machine-readout").inner_text().startswith(f"{entries:.0f} entries per head")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(file: str, scheme: str) -> None:
    with browser_page(viewport={"width": 1400, "height": 1000}, color_scheme=scheme) as (page, troubles):
        open_page(page, file)
        for seen in (TOKENS // 2, TOKENS):
            move(page, seen)
            for measure in ("entries", "age", "oldest"):
                page.locator(f"input[value={measure}]").check(force=True)
                for shade in ("share", "stay"):
                    page.locator(f"input[value={shade}]").check(force=True)
                    contrast = page.evaluate(CONTRAST)
                    assert len(contrast) > 15
                    assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}
        # Every shade that a token can have, not only those of this stream.
        page.evaluate("""ready.then((page) => {
          const levels = Int8Array.from({length: page.run.tokens}, (_, p) => (p % (LEVELS + 1)));
          page.text.shade(levels, true);
        })""")
        assert {name: ratio for name, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5} == {}
        assert troubles == []


def test_a_narrow_window_needs_no_sideways_scrolling(file: str) -> None:
    with browser_page(viewport={"width": 360, "height": 740}) as (page, troubles):
        open_page(page, file)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.set_viewport_size({"width": 900, "height": 740})
        until(page, "document.querySelector('#speed svg').clientWidth > 500")
        assert page.evaluate("document.documentElement.scrollWidth") == 900
        assert troubles == []


def test_a_stream_without_events_and_one_token(tmp_path: Path) -> None:
    for tokens in (1, 40):
        path = tmp_path / f"{tokens}.html"
        texts = [TokenText("x", False)] * tokens
        path.write_text(build_page(random_recording(1, 1, tokens, buffer=1), texts, About("x", [], 640, 1)))
        with browser_page() as (page, troubles):
            open_page(page, path.as_uri())
            assert page.locator("#departures-readout").inner_text() == "No event yet: 0 in all."
            assert troubles == []


def test_a_large_page_opens_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    texts = [TokenText(" word" if position % 12 else "\n", False) for position in range(5000)]
    path.write_text(build_page(random_recording(32, 32, 5000), texts, About("large", [], 640, 32)))
    with browser_page() as (page, troubles):
        open_page(page, path.as_uri())
        milliseconds = page.evaluate("performance.now()")
        # Only the visible part has elements of its own.
        assert page.locator(".tok").count() < 3000
        assert troubles == []
    assert milliseconds < 20_000
