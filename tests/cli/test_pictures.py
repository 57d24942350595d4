"""``trimkv-run`` with images and videos: as from Python, and every wrong file in one line before anything is read."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Run, command
from PIL import Image
from text_artefact import text_artefact
from vision_text_artefact import IMAGE_PLACE, VIDEO_PLACE, noise, png, vision_text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader, Shown
from trimkv_edge.runtime.vision_text import PictureText


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return command([sys.executable, "-m", "trimkv_edge.cli.run"], tmp_path)


@pytest.fixture
def original() -> Path:
    return vision_text_artefact()


def expected(folder: Path, text: str, make: Callable[[PictureReader], list[Shown]], count: int = 8) -> str:
    artefact = Artefact.load(folder)
    assert artefact.tokenizer is not None
    session, shown = Session.open(artefact), make(PictureReader.of(artefact))
    for _ in PictureText(artefact.tokenizer, artefact.manifest.vision).encode(text, shown).feeding(session):
        pass
    return "".join(piece.text for piece in session.generate(count, stop_ids=[2])) + "\n"


def test_pictures_stand_before_the_prompt_in_their_order(original: Path, run: Run, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    noise(2, 16, 16).save(tmp_path / "b.jpg")
    (tmp_path / "film").mkdir()
    for number in range(5):
        noise(number).save(tmp_path / "film" / f"{number}.png")

    def shown(reader: PictureReader) -> list[Shown]:
        return [
            reader.image(tmp_path / "a.png"),
            reader.video(tmp_path / "film", 4.0, 4),
            reader.image(tmp_path / "b.jpg"),
        ]

    options = ["--image", "a.png", "--video", "film", "--image", "b.jpg", "--video-fps", 4, "--video-frames", 4]
    places = IMAGE_PLACE + VIDEO_PLACE + IMAGE_PLACE
    plain = run(original, "--prompt", "the cat", "--max-new-tokens", 8, *options)
    assert (plain.returncode, plain.stdout) == (0, expected(original, places + "the cat", shown)), plain.stderr
    chat = run(original, "--prompt", "the cat", "--max-new-tokens", 8, "--chat", *options)
    told = f"[user] {places}the cat\n[assistant]"
    assert (chat.returncode, chat.stdout) == (0, expected(original, told, shown)), chat.stderr
    # A prompt that says itself where.
    own = f"the {IMAGE_PLACE}cat{VIDEO_PLACE}sat{IMAGE_PLACE}"
    placed = run(original, "--prompt", own, "--max-new-tokens", 8, *options)
    assert (placed.returncode, placed.stdout) == (0, expected(original, own, shown)), placed.stderr
    assert len({plain.stdout, chat.stdout, placed.stdout}) == 3
    behind = run(original, "--prompt", "the cat", "--max-new-tokens", 8, "--pictures-last", *options)
    assert behind.stdout == expected(original, f"the cat{places}", shown)
    behind = run(original, "--prompt", "the cat", "--max-new-tokens", 8, "--pictures-last", "--chat", *options)
    assert behind.stdout == expected(original, f"[user] the cat{places}\n[assistant]", shown)
    other = run(original, "--prompt", "the cat", "--max-new-tokens", 8, *options[2:])
    assert other.stdout != plain.stdout


def test_a_saved_session_goes_on_with_pictures(original: Path, run: Run, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    noise(2).save(tmp_path / "b.png")
    first = run(
        original, "--prompt", "the cat", "--image", "a.png", "--max-new-tokens", 3, "--save-session", "talk.session"
    )
    assert first.returncode == 0, first.stderr
    second = run(original, "--session", "talk.session", "--image", "b.png", "--max-new-tokens", 8)
    assert second.returncode == 0, second.stderr

    artefact = Artefact.load(original)
    assert artefact.tokenizer is not None
    reader, texts = PictureReader.of(artefact), PictureText(artefact.tokenizer, artefact.manifest.vision)
    session = Session.open(artefact)
    for text, number, count in ((IMAGE_PLACE + "the cat", 1, 3), (IMAGE_PLACE, 2, 8)):
        for _ in texts.encode(text, [reader.image(png(noise(number)))]).feeding(session):
            pass
        said = "".join(piece.text for piece in session.generate(count, stop_ids=[2]))
    assert second.stdout == said + "\n"


# Files that are read: the kind of pixels does not matter.
def grey16(path: Path) -> None:
    Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 160).save(path / "x.png")


def cmyk(path: Path) -> None:
    noise(1).convert("CMYK").save(path / "x.png", "JPEG")


def palette_alpha(path: Path) -> None:
    image = noise(1).quantize(16)
    image.save(path / "x.png", transparency=0)


def one_bit(path: Path) -> None:
    noise(1).convert("1").save(path / "x.png")


@pytest.mark.parametrize("make", [grey16, cmyk, palette_alpha, one_bit])
def test_pixels_of_every_kind_are_read(original: Path, run: Run, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    done = run(original, "--prompt", "the", "--image", "x.png", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(original, IMAGE_PLACE + "the", lambda reader: [reader.image(tmp_path / "x.png")], 4)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sized(width: int, height: int) -> bytes:
    """A PNG that says so."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("option", "data", "message"),
    [
        ("--image", png(noise(1))[:300], "x is damaged"),
        ("--image", png(noise(1))[:20], "x ends inside its header"),
        ("--image", b"", "x is empty"),
        ("--image", b"just words", "x is not PNG, JPEG, WebP, GIF or BMP"),
        ("--image", sized(0, 9), "x has 0 x 9 pixels: it is empty or its header is damaged"),
        ("--image", sized(2**31 - 1, 2**31 - 1), "x has 2147483647 x 2147483647 pixels, but at most"),
        ("--image", sized(16384, 2), "x is damaged"),
        ("--image", png(noise(1, 402, 2)), "x: a picture of 402 x 2 pixels is too narrow"),
        ("--image", None, "x does not exist"),
        ("--image", "folder", "x is a folder or a device: give a file"),
        ("--video", "folder", "x holds no frames"),
        ("--video", png(noise(1)), "x holds one picture and no video"),
        ("--video", None, "x does not exist"),
    ],
)
def test_wrong_files_are_one_line_and_exit_2(
    original: Path, run: Run, tmp_path: Path, option: str, data: bytes | str | None, message: str
) -> None:
    noise(1).save(tmp_path / "good.png")
    if isinstance(data, bytes):
        (tmp_path / "x").write_bytes(data)
    elif data:
        (tmp_path / "x").mkdir()
    assert_refused(run(original, "--prompt", "the", "--image", "good.png", option, "x"), message)


def assert_refused(done: object, message: str) -> None:
    lines = done.stderr.splitlines()  # type: ignore[attr-defined]
    assert (done.returncode, done.stdout) == (2, "")  # type: ignore[attr-defined]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a <|image_pad|> b"], "the text has 1 places for images (<|image_pad|>), but 0 were given"),
        (["--prompt", "a <|image_pad|> b", "--chat"], "the text contains <|image_pad|>"),
        (["--prompt", f"{IMAGE_PLACE}{IMAGE_PLACE}", "--image", "a.png"], "2 places for images"),
        (["--prompt", IMAGE_PLACE, "--image", "a.png", "--image", "a.png"], "1 places for images"),
        (["--prompt", "a", "--video-fps", "3"], "--video-fps and --video-frames are for --video"),
        (["--prompt", "a", "--pictures-last"], "--pictures-last is for --image and --video"),
        (["--prompt", "a", "--video", "a.png", "--video-fps", "0"], "0.0 frames per second"),
        (["--prompt", "a", "--video", "a.png", "--video-frames", "1"], "at most 1 frames"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    original: Path, run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    noise(1).save(tmp_path / "a.png")
    assert_refused(run(original, *arguments), message)


def test_text_models_and_templates_without_pictures(original: Path, run: Run, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    assert_refused(
        run(text_artefact(), "--prompt", "a", "--image", "a.png"), "is of a text model, which reads no pictures"
    )
    # As ever, where no picture is shown.
    assert run(text_artefact(), "--prompt", "<|image_pad|>", "--max-new-tokens", 1).returncode == 0


def test_help_teaches(run: Run) -> None:
    done = run("--help")
    assert "--image cat.png --image dog.jpg" in done.stdout
    assert "--video PATH" in done.stdout
