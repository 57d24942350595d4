"""``trimkv-chat`` through a pipe, and in a real terminal with keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from text_artefact import text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session

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
        "/nonsense is not a command: use /help, /stats, /kept, /undo, /save, /load, /reset, /exit",
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
