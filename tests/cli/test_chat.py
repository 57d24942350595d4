"""``trimkv-chat`` through a pipe, and in a real terminal with keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from text_artefact import text_artefact
from vision_text_artefact import noise, vision_text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader, Shown

COMMAND = [sys.executable, "-m", "trimkv_edge.cli.chat"]


def chat(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, str(folder), *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder.parent,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        check=False,
    )


def answers(*messages: str, count: int = 12, system: str | None = None) -> list[str]:
    artefact = Artefact.load(text_artefact())
    talk = Conversation.open(artefact, Session.open(artefact), system)
    return ["".join(piece.text for piece in talk.ask(message, count)) for message in messages]


def test_each_line_is_a_turn_of_one_conversation() -> None:
    done = chat(text_artefact(), "the cat\n\nand the dog\n", "--max-new-tokens", "12", "--system", "be kind")
    assert (done.returncode, done.stdout) == (0, "\n".join([*answers("the cat", "and the dog", system="be kind"), ""]))
    assert answers("the cat", "and the dog")[1] != answers("and the dog")[0]


def test_commands_and_mistakes_do_not_end_the_chat(tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    lines = ["the cat", f"/save {file}", "the dog", "/undo", "/stats", "/kept 5", "/nonsense", "/undo x", "/undo 9"]
    lines += ["/save", "/help me", "the dog", "/reset", "the dog", "/load nowhere", "/exit", "never read"]
    done = chat(text_artefact(), "\n".join(lines), "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    first, second = answers("the cat", "the dog")
    assert done.stdout == "\n".join([first, second, second, answers("the dog")[0], ""])
    for told in (
        f"saved to {file}",
        "taken back; 1 turns are left",
        "engine    onnx, 1 turns",
        "tokens are held by at least one of 4 heads; the last 5 are shown",
        "/nonsense is not a command: use /help, /stats, /kept, /image, /video, /drop, /undo, /save, /load, /reset,",
        "/undo takes a whole number of at least 1, not 'x'",
        "9 turns cannot be taken back: there were 1",
        "/save needs a file name",
        "/help takes nothing, not 'me'",
        "a new chat",
        "nowhere",
    ):
        assert told in done.stderr
    again = chat(text_artefact(), "the dog\n", "--max-new-tokens", "12", "--load", str(file))
    assert again.stdout == second + "\n"
    assert "goes on after" in again.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--undo-depth", "-1"], "-1"),
        (["--load", "missing.session"], "missing.session"),
        (["--engine", "abacus"], "abacus"),
    ],
)
def test_wrong_input_is_one_line(options: list[str], told: str) -> None:
    done = chat(text_artefact(), "hi\n", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_keys_in_a_terminal() -> None:
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], str(text_artefact()), "--max-new-tokens", "100000000", "--no-verify"],
        env={**os.environ, "TERM": "xterm"},
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        dimensions=(30, 160),
    )
    child.expect("/help lists the commands")
    prompted(child)
    child.expect("per head")  # the bar
    child.sendintr()  # at the prompt: nothing happens
    prompted(child)
    child.send("hello\r")
    child.expect("hello")
    child.expect(r"\n.*\S.{200,}")  # an answer without end
    child.sendintr()
    child.expect("stopped")
    prompted(child)
    child.expect("tokens/s")
    for line, told in (("/stats", "1 turns"), ("/kept 8", "the last 8 are shown"), ("/undo", "0 turns are left")):
        child.send(f"{line}\r")
        child.expect(told)
        prompted(child)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def prompted(child: pexpect.spawn) -> None:
    """Answers the prompt's question where the cursor is: without an answer there is no bar."""
    child.expect(r"\x1b\[6n")
    child.send("\x1b[1;1R")


def test_pictures_belong_to_the_turn_of_the_next_message(tmp_path: Path) -> None:
    folder = vision_text_artefact()
    film = tmp_path / "a film"
    film.mkdir()
    for number in range(4):
        noise(number).save(film / f"{number}.png")
    noise(1).save(tmp_path / "a.png")
    noise(2).save(tmp_path / "b.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    file = tmp_path / "talk.session"
    lines = [f"/image {tmp_path / 'a.png'} {tmp_path / 'b.png'}", "which?", "and now?", f"/save {file}"]
    lines += [f"/image {tmp_path / 'bad.png'}", "/image", "/image 'x", f"/video '{film}'", "look", "/undo", "look"]
    lines += [f"/image {tmp_path / 'a.png'}", "what is <|image_pad|>?", "look", "/undo"]
    lines += [f"/image {tmp_path / 'a.png'}", "/drop", "look", "/undo 9", "/undo 3", "and now?"]
    done = chat(folder, "\n".join(lines), "--max-new-tokens", "12", "--video-fps", "4")
    assert done.returncode == 0, done.stderr

    artefact = Artefact.load(folder)
    reader = PictureReader.of(artefact)
    one, two, video = reader.image(tmp_path / "a.png"), reader.image(tmp_path / "b.png"), reader.video(film, 4.0)

    def said(*turns: tuple[str, list[Shown]]) -> list[str]:
        talk = Conversation.open(artefact, Session.open(artefact))
        return ["".join(piece.text for piece in talk.ask(text, 12, shown=shown)) for text, shown in turns]

    before = [("which?", [one, two]), ("and now?", [])]
    want = said(*before)
    want.append(said(*before, ("look", [video]))[-1])
    plain = said(*before, ("look", []))[-1]
    # A message that is refused keeps its picture.
    want += [plain, "", said(*before, ("look", []), ("look", [one]))[-1], said(*before, ("look", []), ("look", []))[-1]]
    want.append(want[1])
    assert done.stdout == "\n".join([*want, ""])
    assert len(set(want)) == len(want) - 1
    for told in (
        "with the next message: 2 images, 0 videos, 12 tokens (/drop forgets them)",
        "with the next message: 0 images, 1 videos, 12 tokens",
        "bad.png is not PNG, JPEG, WebP, GIF or BMP",
        "/image needs a file name",
        "/image 'x: a quotation mark is not closed",
        "the text contains <|image_pad|>",
        "no pictures with the next message",
        "9 turns cannot be taken back: there were 4",
    ):
        assert told in done.stderr, told
    last = chat(folder, f"/image {tmp_path / 'a.png'}\nwhich?\n", "--max-new-tokens", "12", "--pictures-last")
    talk = Conversation.open(artefact, Session.open(artefact))
    assert (
        last.stdout == "".join(piece.text for piece in talk.ask("which?", 12, shown=[one], pictures_last=True)) + "\n"
    )
    assert last.stdout != said(("which?", [one]))[0] + "\n"
    # What was saved goes on as what was said.
    again = chat(folder, f"/video '{film}'\nlook\n", "--max-new-tokens", "12", "--load", str(file), "--video-fps", "4")
    assert again.stdout == want[2] + "\n"


def test_text_models_show_no_pictures(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    done = chat(text_artefact(), f"/image {tmp_path / 'a.png'}\nthe cat\n", "--max-new-tokens", "12")
    assert done.stdout == answers("the cat")[0] + "\n"
    assert "is of a text model, which reads no pictures" in done.stderr
