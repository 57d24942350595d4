"""The page's file: what it holds, that it holds it safely, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from pictured_stream import PLACES, TOKENS, pictured
from recorded_stream import random_recording, recorded

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.lifetimes import LEFT_NEVER
from trimkv_edge.runtime.report.page import MOST_ENTRIES, MOST_TOKENS, About, build_page, heads_to_show
from trimkv_edge.runtime.report.text import TokenText


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside] = self.raw.get(self._inside, "") + data


@pytest.fixture(scope="module")
def elements() -> Elements:
    return Elements(recorded().page)


def test_nothing_comes_from_outside(elements: Elements) -> None:
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "onload"} & attributes.keys(), (tag, attributes)
    assert "@import" not in elements.raw["style"]
    assert "url(" not in elements.raw["style"]


def test_the_policy_allows_this_script_and_style_only(elements: Elements) -> None:
    policy = next(attributes["content"] for _, attributes in elements.tags if "http-equiv" in attributes)

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    script, style = digest(elements.raw["script"]), digest(elements.raw["style"])
    assert policy == f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"


def test_pictures_are_data_and_the_policy_lets_them_in() -> None:
    recording = pictured().recording
    page = Elements(build_page(recording, [TokenText("x", False)] * TOKENS, About("x", [], 12, 2)))
    policy = next(str(attributes["content"]) for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith("; img-src data:")
    assert "img" not in [tag for tag, _ in page.tags]
    found = json.loads(page.raw["data"])["pictures"]
    assert [picture["start"] for picture in found] == [places[0] for places in PLACES.values()]
    assert [picture["down"] * picture["across"] for picture in found] == list(map(len, PLACES.values()))
    assert [base64.b64decode(picture["png"]) for picture in found] == [picture.png for picture in recording.pictures]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {"pictures", "picture-readout", "kinds"} <= ids


def test_a_page_of_text_has_nothing_for_pictures(elements: Elements) -> None:
    page = recorded().page
    for word in ("Picture", "pictures", "img-src", "picture-frame", "KindChart"):
        assert word not in page, word
    # What it has is what it had before there were pictures: template, style and scripts, one after the other.
    scripts = ("record", "colours", "chart", "overview", "charts", "text", "page", "start")
    assets = files("trimkv_edge.runtime.report").joinpath("assets")
    want = "\n".join(assets.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in scripts)
    assert elements.raw["script"] == want
    assert elements.raw["style"] == assets.joinpath("style.css").read_text(encoding="utf-8")
    around = assets.joinpath("page.html").read_text(encoding="utf-8").replace("$pictures", "")
    assert page.endswith(around.partition("$script")[2])
    assert around.partition("$style")[2].partition("$data")[0].split("$name")[1] in page


def test_hostile_text_is_data(elements: Elements) -> None:
    names = [tag for tag, _ in elements.tags]
    assert (names.count("script"), names.count("b"), names.count("i")) == (3, 0, 0)
    assert elements.raw["title"] == 'a "name" <b>&</b>: what the cache holds'
    assert not set("<>&") & set(elements.raw["data"])
    data = json.loads(elements.raw["data"])
    assert data["text"] == [text.text for text in recorded().texts]
    assert "</script><script>alert(1)</script><!--" in "".join(data["text"])
    assert [data["text"][position] for position in data["special"]] == ["<s>"]
    assert (data["name"], data["notes"]) == ('a "name" <b>&</b>', ["a <note>"])
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u202e]", recorded().page)


def test_numbers_are_those_of_the_recording(elements: Elements) -> None:
    recording = recorded().recording
    data = json.loads(elements.raw["data"])
    assert (data["layers"], data["heads"], data["kvHeads"], data["slots"]) == (2, [0, 1], 2, 24)
    assert (data["tokens"], data["promptTokens"]) == (len(recording.tokens), len(recording.tokens) - 10)
    assert data["events"] == recording.lifetimes.events.tolist()
    assert data["chunks"]["seen"] == [chunk.seen for chunk in recording.chunks]
    assert data["chunks"]["entries"] == [chunk.entries for chunk in recording.chunks]


def test_the_table_counts_the_events_that_each_token_outlived(elements: Elements) -> None:
    lifetimes = recorded().recording.lifetimes
    packed = zlib.decompress(base64.b64decode(elements.raw["table"]))
    flat = lifetimes.left.reshape(-1, lifetimes.tokens)
    events = lifetimes.events.tolist()
    assert len(packed) == flat.size
    for row in range(flat.shape[0]):
        for position in range(lifetimes.tokens):
            end = flat[row, position]
            want = sum(position < event and (end == LEFT_NEVER or event < end) for event in events)
            assert packed[row * lifetimes.tokens + position] == want


def test_a_large_page_is_small() -> None:
    recording = random_recording(32, 32, 5000)
    texts = [TokenText(" word", False)] * 5000
    page = build_page(recording, texts, About("large", [], 640, 32))
    assert len(page.encode()) < 5_000_000


def test_events_beyond_a_byte_have_more_planes() -> None:
    recording = random_recording(1, 1, 700, budget=1, buffer=1)
    recording.lifetimes.left[0, 0, :2] = LEFT_NEVER
    page = Elements(build_page(recording, [TokenText("x", False)] * 700, About("x", [], 2, 1)))
    packed = np.frombuffer(zlib.decompress(base64.b64decode(page.raw["table"])), np.uint8)
    # Events after 2, 3, ..., 700 tokens: token 0 outlived 699 and token 1 too.
    assert packed.size == 2 * 700
    assert [int(packed[at]) + 256 * int(packed[700 + at]) for at in (0, 1)] == [699, 699]


def test_texts_that_are_not_one_for_each_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 texts for 700 tokens"):
        build_page(random_recording(1, 1, 700), [TokenText("x", False)], About("x", [], 2, 1))


def test_heads_are_left_out_when_the_text_is_long() -> None:
    assert heads_to_show(5000, 32, 32) == tuple(range(32))
    some = heads_to_show(50_000, 40, 32)
    assert len(some) == MOST_ENTRIES // (50_000 * 40) == 8
    assert some == (0, 4, 8, 12, 16, 20, 24, 28)
    assert heads_to_show(MOST_TOKENS, 4, 2) == (0, 1)
    with pytest.raises(
        ConfigError, match=f"200001 tokens are more than a page of 4 layers can show: at most {MOST_TOKENS}"
    ):
        heads_to_show(MOST_TOKENS + 1, 4, 2)
    with pytest.raises(ConfigError, match=f"at most {MOST_ENTRIES // 100}"):
        heads_to_show(190_000, 100, 8)
