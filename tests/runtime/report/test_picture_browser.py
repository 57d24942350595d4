"""Pictures on the page in a real browser: the survivors' numbers wherever the slider is, by mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from browser import browser_page
from pictured_stream import EVENTS, HEADS, LAYERS, PLACES, TOKENS, pictured
from report_browser import CONTRAST, move, open_page, until

from trimkv_edge.runtime.report.page import About, build_page
from trimkv_edge.runtime.report.pictures import row_texts
from trimkv_edge.runtime.report.text import TokenText

if TYPE_CHECKING:
    from playwright.sync_api import Page

SEENS = (1, 5, *EVENTS, 24, TOKENS)
ALL = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "report.html"
    texts = row_texts([TokenText(f" t{position}", False) for position in range(TOKENS)], pictured().recording)
    page = build_page(pictured().recording, texts, About("pictures", [("a", "b")], 12, HEADS))
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def shared(file: str) -> Iterator[tuple[Page, list[str]]]:
    with browser_page(viewport={"width": 1400, "height": 1100}) as (page, troubles):
        yield page, troubles


@pytest.fixture
def report(shared: tuple[Page, list[str]], file: str) -> Iterator[Page]:
    """The page, freshly opened; it has to end without a complaint."""
    opened, troubles = shared
    open_page(opened, file)
    yield opened
    assert troubles == []


def readout(page: Page, index: int, row: int) -> str:
    """What pointing at the middle of a row's square says."""
    down, across = ((2, 3), (2, 2), (2, 2))[index]
    frame = page.locator(".picture-frame").nth(index)
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    assert box is not None
    x, y = (
        box["x"] + (row % across + 0.5) * box["width"] / across,
        box["y"] + (row // across + 0.5) * box["height"] / down,
    )
    page.mouse.move(x, y)
    return page.locator("#picture-readout").inner_text()


def held(count: int, of: int) -> str:
    return "not read yet" if count < 0 else f"held by {count} of {of} {'head' if of == 1 else 'heads'}"


def test_the_slider_moves_the_squares(report: Page) -> None:
    counted = set()
    for seen in SEENS:
        move(report, seen)
        for index, places in enumerate(PLACES.values()):
            counts = [pictured().holders(seen, position) for position in places]
            script = f"ready.then((page) => page.views[{index}].counts.map((count) => (count === UNREAD ? -1 : count)))"
            assert report.evaluate(script) == counts, seen
            for row in (0, len(places) - 1):
                assert readout(report, index, row).endswith(f": {held(counts[row], 4)}."), (seen, index, row)
                counted.add(counts[row])
    assert counted == {-1, 0, 1, 2, 3, 4}


def test_a_square_says_where_it_is(report: Page) -> None:
    move(report, TOKENS)
    assert readout(report, 0, 4).startswith(
        "image 1, row 5 of 6 (2 down, 2 across), pixels 16 to 31 across, 16 to 31 down"
    )
    assert readout(report, 2, 1).startswith(
        "video 1, 1.2 s, row 2 of 4 (1 down, 2 across), pixels 16 to 31 across, 0 to 15"
    )
    # The token's own table is that of its place in the stream, and the square is framed.
    assert report.locator("#token .token-title").inner_text().startswith("24 ▣")
    assert report.locator(".patch-mark:visible").count() == 1
    for index, row, left, top in ((0, 4, 1 / 3, 1 / 2), (0, 2, 2 / 3, 0), (1, 3, 1 / 2, 1 / 2)):
        readout(report, index, row)
        mark = report.locator(".patch-mark:visible").bounding_box()
        frame = report.locator(".picture-frame").nth(index).bounding_box()
        assert mark is not None
        assert frame is not None
        assert abs(mark["x"] - frame["x"] - left * frame["width"]) < 1, (index, row)
        assert abs(mark["y"] - frame["y"] - top * frame["height"]) < 1, (index, row)
        assert abs(mark["height"] - frame["height"] / 2) < 1, (index, row)
    report.locator("h1").hover()
    assert "Point at a square" in report.locator("#picture-readout").inner_text()
    assert report.locator(".patch-mark:visible").count() == 0


def test_layer_and_head_choose_whose_entries_count(report: Page) -> None:
    move(report, EVENTS[1])
    for layer, head in ((1, -1), (-1, 0), (0, 1)):
        report.select_option("#layer", str(layer))
        report.select_option("#head", str(head))
        heads = [where for where in ALL if layer in (-1, where[0]) and head in (-1, where[1])]
        for row, position in enumerate(PLACES["image"]):
            count = pictured().holders(EVENTS[1], position, heads)
            assert readout(report, 0, row).endswith(f": {held(count, len(heads))}."), (layer, head, row)


def test_captions_and_legend_have_the_numbers(report: Page) -> None:
    move(report, 16)  # in the middle of the second picture
    first, second, third = report.locator(".picture figcaption").all_inner_texts()
    counts = [pictured().holders(16, position) for position in PLACES["image"]]
    kept, mean = sum(count > 0 for count in counts), f"{sum(counts) / 6:.1f}".removesuffix(".0")
    assert first == f"image 1, 48 × 32 pixels: {kept} of 6 rows held, by {mean} of 4 heads on average"
    assert second == "video 1, 0.2 s, 32 × 32 pixels: 2 of 2 rows read so far held, by 4 of 4 heads on average"
    assert third == "video 1, 1.2 s, 32 × 32 pixels: not read yet"
    assert report.locator("#patch-legend > *").all_inner_texts() == [
        "none", "1", "2", "3", "4", "heads", "no square: not read yet",
    ]  # fmt: skip
    label = report.locator(".picture canvas").nth(0).get_attribute("aria-label")
    assert label == f"image 1: {kept} of 6 rows held, by {mean} of 4 heads on average"


def test_squares_are_painted_in_the_colours_of_the_legend(report: Page) -> None:
    def colours() -> list[list[int]]:
        """Alpha and red of each square of the image, beside its number."""
        return report.evaluate("""ready.then((page) => {
          const {canvas} = page.views[0], context = canvas.getContext("2d");
          const at = (row) => [(row % 3 + 0.12) * canvas.width / 3, (Math.floor(row / 3) + 0.12) * canvas.height / 2];
          return [0, 1, 2, 3, 4, 5].map((row) => [...context.getImageData(...at(row).map(Math.round), 1, 1).data]);
        })""")  # type: ignore[no-any-return]

    move(report, EVENTS[0])
    until(report, "ready.then((page) => page.views[0].visible)")
    counts = [pictured().holders(EVENTS[0], position) for position in PLACES["image"]]
    painted = colours()
    by_count = {count: {tuple(painted[row]) for row in range(6) if counts[row] == count} for count in counts}
    assert len(by_count) >= 3
    assert all(len(found) == 1 for found in by_count.values())
    assert len(set().union(*by_count.values())) == len(by_count)
    # The more heads, the darker.
    tones = [next(iter(by_count[count]))[0] for count in sorted(by_count) if count]
    assert tones == sorted(tones, reverse=True)
    report.locator("#overlay").uncheck()
    assert {pixel[3] for pixel in colours()} == {0}
    report.locator("#overlay").check()
    assert colours() == painted
    move(report, 5)
    assert [pixel[3] > 0 for pixel in colours()] == [True, True, True, False, False, False]


def test_shares_of_text_and_pictures(report: Page) -> None:
    for seen in SEENS:
        move(report, seen)
        entries = dict.fromkeys(("text", "images", "videos"), 0)
        for position in range(seen):
            kind = "images" if position in PLACES["image"] else "text"
            kind = "videos" if position in PLACES["first"] or position in PLACES["second"] else kind
            entries[kind] += pictured().holders(seen, position)
        text = report.locator("#kinds-readout").inner_text()
        assert text.startswith(f"After {seen} tokens: text ")
        for kind, count in entries.items():
            share = 100 * count / sum(entries.values())
            shown = text.split(f"{kind} ")[1]
            assert abs(float(shown.split(" %")[0]) - share) <= (0.5 if share >= 10 else 0.05), (seen, kind)
            assert shown.split("(")[1].startswith(f"{count} entries)"), (seen, kind)
    assert report.locator("#kinds .line-item").all_inner_texts() == ["text", "images", "videos"]
    assert report.locator("#kinds svg[role=img]").get_attribute("aria-label") is not None


def test_pictures_work_by_keyboard(report: Page) -> None:
    frame = report.locator(".picture-frame").nth(0)
    assert "Arrow keys" in str(frame.get_attribute("aria-label"))
    frame.focus()
    assert report.locator("#picture-readout").inner_text().startswith("image 1, row 1 of 6")
    for key, row in (("ArrowRight", 2), ("ArrowDown", 5), ("ArrowLeft", 4), ("ArrowUp", 1), ("End", 6), ("Home", 1)):
        report.keyboard.press(key)
        assert report.locator("#picture-readout").inner_text().startswith(f"image 1, row {row} of 6"), key
    report.keyboard.press("ArrowRight")
    report.keyboard.press("Enter")
    until(report, f"document.getElementById('time').value === '{PLACES['image'][1] + 1}'")
    report.keyboard.press("Tab")
    assert report.locator("#picture-readout").inner_text().startswith("video 1, 0.2 s, row 1 of 4")
    assert report.locator("#picture-readout").get_attribute("aria-live") == "polite"


def test_pictures_come_from_the_page_alone(report: Page) -> None:
    sources = report.evaluate(
        "[...document.images].map((image) => [image.src.slice(0, 22), image.naturalWidth, image.alt])"
    )
    assert sources == [
        ["data:image/png;base64,", 48, "image 1 as the encoder saw it"],
        ["data:image/png;base64,", 32, "video 1, 0.2 s as the encoder saw it"],
        ["data:image/png;base64,", 32, "video 1, 1.2 s as the encoder saw it"],
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_beside_pictures_can_be_read(file: str, scheme: str) -> None:
    with browser_page(viewport={"width": 1400, "height": 1000}, color_scheme=scheme) as (page, troubles):
        open_page(page, file)
        for seen in (EVENTS[0], TOKENS):
            move(page, seen)
            contrast = page.evaluate(CONTRAST)
            assert any("FIGCAPTION" in name for name in contrast)
            assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}
        assert troubles == []


def test_pictures_fit_a_narrow_window(file: str) -> None:
    with browser_page(viewport={"width": 360, "height": 740}) as (page, troubles):
        open_page(page, file)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert troubles == []
