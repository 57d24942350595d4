"""``trimkv-serve`` as a process: it serves, ends when told, and refuses what cannot be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from running_server import answers
from text_artefact import text_artefact
from vision_text_artefact import noise, vision_text_artefact

from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader

COMMAND = [sys.executable, "-m", "trimkv_edge.cli.serve"]


def start(*options: str, folder: Path | None = None) -> subprocess.Popen[str]:
    where = folder or text_artefact()
    environment = {**os.environ, "SERVE_KEY": "secret", "EMPTY_KEY": ""}
    return subprocess.Popen(
        [*COMMAND, str(where), *options], stderr=subprocess.PIPE, text=True, env=environment, cwd=where.parent
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_and_ends_when_told(number: signal.Signals, code: int) -> None:
    server = start("--port", "0", "--sessions", "1", "--threads", "1", "--api-key-env", "SERVE_KEY")
    try:
        assert server.stderr is not None
        line = next(text for text in server.stderr if text.startswith("serving"))
        found = re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:\d+/v1) with 1 sessions\n", line)
        assert found is not None
        client = OpenAI(base_url=found[2], api_key="secret", max_retries=0)
        messages = [{"role": "user", "content": "the cat"}]
        reply = client.chat.completions.create(model=found[1], messages=messages, max_tokens=12)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == answers("the cat")[0]
        client.close()
        server.send_signal(number)
        rest = server.stderr.read()
        assert (server.wait(20), rest) == (code, "interrupted\n" if code else "")
    finally:
        server.kill()
        server.wait()


def test_chats_outlive_it(tmp_path: Path) -> None:
    said: list[dict[str, str]] = []
    for number, text in enumerate(("the cat", "the dog")):
        server = start("--port", "0", "--sessions", "1", "--state-dir", str(tmp_path / "chats"))
        try:
            assert server.stderr is not None
            line = next(text for text in server.stderr if text.startswith("serving"))
            client = OpenAI(base_url=line.split()[3], api_key="none", max_retries=0)
            said.append({"role": "user", "content": text})
            reply = client.chat.completions.create(
                model=line.split()[1],
                messages=said,  # type: ignore[arg-type]
                max_tokens=12,
                extra_body={"conversation": "anna"},
            )
            client.close()
            said.append({"role": "assistant", "content": str(reply.choices[0].message.content)})
            assert reply.usage is not None
            assert (reply.usage.prompt_tokens_details.cached_tokens > 0) == (number == 1)  # type: ignore[union-attr]
            server.terminate()
            assert server.wait(20) == 0
        finally:
            server.kill()
            server.wait()
    assert [message["content"] for message in said[1::2]] == answers("the cat", "the dog")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give --api-key-env NAME"),
        (["--host", "0.0.0.0", "--api-key-env", "EMPTY_KEY"], "EMPTY_KEY: this environment variable is not set"),
        (["--port", "70000"], "--port is 70000"),
        (["--sessions", "0", "--port", "0"], "sessions is 0"),
        (["--waiting", "-1", "--port", "0", "--sessions", "1"], "-1 waiting requests"),
        (["--undo", "-1", "--port", "0", "--sessions", "1"], "undo is -1"),
        (["--state-dir", "x", "--saved", "0", "--port", "0", "--sessions", "1"], "at most 0 saved sessions"),
        (["--timeout", "0", "--port", "0", "--sessions", "1"], "timeout is 0.0"),
        (["--sessions", "100000000", "--port", "0"], "of memory are available"),
        (["--image-folder", ".", "--port", "0", "--sessions", "1"], "an image folder is for models that read pictures"),
    ],
)
def test_what_cannot_be_is_one_line(options: list[str], told: str) -> None:
    server = start(*options)
    _, errors = server.communicate(timeout=60)
    assert (server.returncode, told in errors, errors.count("\n")) == (2, True, 1), errors


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start("--port", str(taken.getsockname()[1]))
        _, errors = server.communicate(timeout=60)
    assert (server.returncode, "Address already in use" in errors, errors.count("\n")) == (2, True, 1), errors


def test_it_shows_pictures_of_its_folder(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    options = ["--port", "0", "--sessions", "1", "--threads", "1", "--image-folder", str(tmp_path)]
    server = start(*options, folder=vision_text_artefact())
    try:
        assert server.stderr is not None
        line = next(text for text in server.stderr if text.startswith("serving"))
        client = OpenAI(base_url=line.split()[3], api_key="none", max_retries=0)
        content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "what is it?"}]
        reply = client.chat.completions.create(
            model=line.split()[1],
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=12,
        )
        artefact = Artefact.load(vision_text_artefact())
        shown = [PictureReader.of(artefact).image(tmp_path / "a.png")]
        talk = Conversation.open(artefact, Session.open(artefact))
        want = "".join(piece.text for piece in talk.ask("what is it?", 12, shown=shown))
        assert reply.choices[0].message.content == want
        client.close()
    finally:
        server.kill()
        server.wait()
