"""What is told of a stream's pictures, against the survivors that it was made from, counted one by one."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from pictured_stream import EVENTS, PLACES, TOKENS, pictured
from recorded_stream import random_recording

from trimkv_edge.runtime.recording import Recording
from trimkv_edge.runtime.report.page import About
from trimkv_edge.runtime.report.picture_plots import moments
from trimkv_edge.runtime.report.pictures import entries_by_kind, held_rows, numbers, row_texts
from trimkv_edge.runtime.report.plots import plot_all
from trimkv_edge.runtime.report.text import TokenText

RECORDING = pictured().recording
SEENS = (1, 5, 11, *EVENTS, 15, 24, TOKENS)


def kind(position: int) -> str:
    if position in PLACES["image"]:
        return "image"
    return "video" if position in PLACES["first"] or position in PLACES["second"] else "text"


@pytest.mark.parametrize("seen", SEENS)
def test_rows_are_held_by_the_heads_that_kept_them(seen: int) -> None:
    for picture, places in zip(RECORDING.pictures, PLACES.values(), strict=True):
        found = held_rows(RECORDING, picture, seen)
        assert found.shape == (picture.down, picture.across)
        assert found.reshape(-1).tolist() == [pictured().holders(seen, position) for position in places]


def test_the_stream_tells_heads_and_moments_apart() -> None:
    found = [held_rows(RECORDING, RECORDING.pictures[0], seen).reshape(-1).tolist() for seen in EVENTS]
    assert len({tuple(counts) for counts in found}) == len(EVENTS)
    assert len({count for counts in found for count in counts}) >= 4


def test_entries_of_each_kind() -> None:
    want = [
        [
            sum(max(0, pictured().holders(seen, position)) for position in range(TOKENS) if kind(position) == name)
            for name in ("text", "image", "video")
        ]
        for seen in SEENS
    ]
    assert entries_by_kind(RECORDING, SEENS).tolist() == want
    assert [sum(row) for row in want[3:7]] == [32, 32, 32, 32]
    assert entries_by_kind(RECORDING, []).shape == (0, 3)


def test_numbers_for_a_file() -> None:
    found = json.loads(json.dumps(numbers(RECORDING)))
    assert sorted(found) == ["entries", "pictures"]
    for picture, places in zip(found["pictures"], PLACES.values(), strict=True):
        assert picture["start"] == places[0]
        for seen, pairs in zip(EVENTS, picture["held"], strict=True):
            counts = [pictured().holders(seen, position) for position in places]
            assert pairs == [[row, count] for row, count in enumerate(counts) if count > 0]
    assert {key: found["pictures"][1][key] for key in ("kind", "number", "seconds", "down", "across", "side")} == {
        "kind": "video", "number": 1, "seconds": 0.2, "down": 2, "across": 2, "side": 16,
    }  # fmt: skip
    assert found["pictures"][0]["seconds"] is None
    after = [
        sum(pictured().holders(EVENTS[-1], p) for p in range(EVENTS[-1]) if kind(p) == name)
        for name in found["entries"]
    ]
    assert [values[-1] for values in found["entries"].values()] == after


def test_a_stream_of_text_has_no_numbers_of_pictures() -> None:
    assert numbers(random_recording(1, 1, 700)) == {}


def test_rows_have_one_sign_each() -> None:
    texts = [TokenText("<|image_pad|>" if kind(p) != "text" else f"t{p}", False) for p in range(TOKENS)]
    found = row_texts(texts, RECORDING)
    assert [text.text for text in found] == ["▣" if kind(p) != "text" else f"t{p}" for p in range(TOKENS)]
    assert row_texts(texts, random_recording(1, 1, TOKENS)) == texts


def test_moments_begin_where_a_picture_ends() -> None:
    assert moments(RECORDING, RECORDING.pictures[0]) == [8, 20, 28, 40]
    assert moments(RECORDING, RECORDING.pictures[2]) == [26, 28, 36, 40]
    # No event follows.
    late = replace(RECORDING.pictures[2], start=36)
    assert moments(RECORDING, late) == [40, 40, 40, 40]


def size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def test_plots_have_a_line_for_each_picture_and_stay_bounded(tmp_path: Path) -> None:
    about = About("x", [], 12, 2)
    names = [path.stem for path in plot_all(RECORDING, about, tmp_path)]
    assert names == ["stream", "heads", "retention", "events", "machine", "pictures", "kinds"]
    three = size(tmp_path / "pictures.png")
    first = (tmp_path / "pictures.png").read_bytes()
    plot_all(RECORDING, about, tmp_path)
    assert (tmp_path / "pictures.png").read_bytes() == first
    many = Recording(RECORDING.lifetimes, RECORDING.tokens, TOKENS, RECORDING.chunks, RECORDING.pictures * 40)
    plot_all(many, about, tmp_path)
    twelve = size(tmp_path / "pictures.png")
    assert twelve[0] == three[0]
    assert 3 * three[1] < twelve[1] < 5 * three[1]


def test_the_plot_shows_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.axes

    written: list[str] = []
    real = matplotlib.axes.Axes.text

    def text(self: matplotlib.axes.Axes, x: float, y: float, s: str, **style: object) -> object:
        written.append(s)
        return real(self, x, y, s, **style)  # type: ignore[arg-type]

    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    plot_all(RECORDING, About("x", [], 12, 2), tmp_path)
    want = [
        str(pictured().holders(seen, position))
        for places, seens in zip(PLACES.values(), ((8, 20, 28, 40), (18, 20, 36, 40), (26, 28, 36, 40)), strict=True)
        for seen in seens
        for position in places
    ]
    assert written == want
