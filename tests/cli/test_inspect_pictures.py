"""``trimkv-inspect`` with images and videos: its page, numbers and plots are those of the stream."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command import Run, command
from PIL import Image
from text_artefact import text_artefact
from vision_text_artefact import IMAGE_PLACE, VIDEO_PLACE, noise, vision_text_artefact

from trimkv_edge.engine import IntArray
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader
from trimkv_edge.runtime.vision_text import PictureText

PROMPT = "the cat sat on the mat and the dog sat on the log. " * 2


@pytest.fixture
def run(tmp_path: Path) -> Run:
    noise(1, 40, 30).save(tmp_path / "a.png")
    noise(2, 20, 30).save(tmp_path / "b.jpg", quality=95)
    (tmp_path / "film").mkdir()
    for number in range(3):
        noise(3 + number).save(tmp_path / "film" / f"{number}.png")
    return command([sys.executable, "-m", "trimkv_edge.cli.inspect"], tmp_path)


OPTIONS = ["--image", "a.png", "--video", "film", "--image", "b.jpg", "--max-new-tokens", 12]


def after_events(folder: Path, prompt: str) -> tuple[list[int], dict[int, IntArray]]:
    """Tokens of the stream, and what its heads hold after each event, from a session that is fed by hand."""
    artefact = Artefact.load(vision_text_artefact())
    assert artefact.tokenizer is not None
    reader = PictureReader.of(artefact)
    shown = [reader.image(folder / "a.png"), reader.video(folder / "film"), reader.image(folder / "b.jpg")]
    reading = PictureText(artefact.tokenizer, artefact.manifest.vision).encode(prompt, shown)
    session, held = Session.open(artefact), {}

    def note() -> None:
        seen = session.engine.seen
        if seen >= 32 and (seen - 32) % 8 == 0 and seen not in held:
            held[seen] = session.engine.survivors()

    for _ in reading.feeding(session):
        note()
    made = []
    for piece in session.generate(13, stop_ids=[2]):
        note()
        made.append(piece.token)
    return [*reading.tokens, *made][: session.engine.seen], held


def test_page_numbers_and_plots_are_those_of_the_stream(run: Run, tmp_path: Path) -> None:
    done = run(vision_text_artefact(), "--prompt", PROMPT, *OPTIONS, "--json", "numbers.json", "--png", "plots")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert ", 7 plots in plots: " in done.stderr
    tokens, held = after_events(tmp_path, IMAGE_PLACE + VIDEO_PLACE + IMAGE_PLACE + PROMPT)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["tokens"] == tokens
    assert numbers["events"] == list(held)
    assert len(held) > 5
    told = [(picture["kind"], picture["number"], picture["down"], picture["across"]) for picture in numbers["pictures"]]
    assert told == [("image", 1, 2, 3), ("video", 1, 2, 3), ("video", 1, 2, 3), ("image", 2, 3, 2)]
    entries = {"text": [0] * len(held), "image": [0] * len(held), "video": [0] * len(held)}
    kinds = {316: "image", 317: "video"}
    for event, (seen, kept) in enumerate(held.items()):
        for position in kept.reshape(-1).tolist():
            entries[kinds.get(tokens[position], "text")][event] += 1
        for picture in numbers["pictures"]:
            counts = [int((kept == picture["start"] + row).sum()) for row in range(6)]
            assert picture["held"][event] == [[row, count] for row, count in enumerate(counts) if count], seen
    assert numbers["entries"] == entries
    assert min(entries["image"][0], entries["video"][0]) > 0

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    data = json.loads(found[1])
    assert dict(data["facts"])["pictures"] == "4, of 24 rows"
    assert [picture["label"] for picture in data["pictures"]] == [
        "image 1",
        "video 1, 0.2 s",
        "video 1, 1.0 s",
        "image 2",
    ]
    assert "".join(data["text"]).count("▣") == 24
    assert PROMPT in "".join(data["text"])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["pictures"][0]["png"]))))
    np.testing.assert_array_equal(pixels, np.asarray(noise(1, 40, 30).resize((24, 16), Image.Resampling.BICUBIC)))
    for name in ("pictures", "kinds"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as plot:
            assert min(plot.size) > 300


def test_chat_and_places_in_the_prompt(run: Run, tmp_path: Path) -> None:
    artefact = vision_text_artefact()
    own = f"the {IMAGE_PLACE}cat{VIDEO_PLACE}sat{IMAGE_PLACE}{PROMPT}"
    for arguments, text in ((["--prompt", PROMPT, "--chat"], None), (["--prompt", own], own)):
        done = run(artefact, *arguments, *OPTIONS, "--json", "numbers.json")
        assert done.returncode == 0, done.stderr
        want = f"[user] {IMAGE_PLACE}{VIDEO_PLACE}{IMAGE_PLACE}{PROMPT}\n[assistant]" if text is None else text
        tokens, held = after_events(tmp_path, want)
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert (numbers["tokens"], numbers["events"]) == (tokens, list(held))


def test_a_vision_model_without_pictures_and_a_text_model(run: Run, tmp_path: Path) -> None:
    for artefact in (vision_text_artefact(), text_artefact()):
        done = run(artefact, "--prompt", PROMPT, "--json", "numbers.json", "--png", f"plots-{artefact.name}")
        assert done.returncode == 0, done.stderr
        assert ", 5 plots in" in done.stderr
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert sorted(numbers) == ["chunks", "events", "heads", "left", "prompt_tokens", "tokens"]
        assert "img-src" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no.png"], "no.png does not exist"),
        (["--image", "film"], "film is a folder or a device: give a file"),
        (["--video", "a.png"], "a.png holds one picture and no video"),
        (["--video-fps", "2"], "--video-fps and --video-frames are for --video"),
    ],
)
def test_wrong_pictures_are_one_line_and_exit_2(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_refused(run(vision_text_artefact(), "--prompt", "a", *arguments), message)
    assert not (tmp_path / "report.html").exists()


def test_a_text_model_is_shown_no_pictures(run: Run) -> None:
    done = run(text_artefact(), "--prompt", "a", "--image", "a.png")
    assert_refused(done, "is of a text model, which reads no pictures")


def assert_refused(done: object, message: str) -> None:
    lines = done.stderr.splitlines()  # type: ignore[attr-defined]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), lines  # type: ignore[attr-defined]
    assert lines[0].startswith("error: ")
    assert message in lines[0]
