"""``trimkv-cache-prompt`` and the session options of ``trimkv-run``, as processes over a real engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from text_artefact import save_manifest, text_artefact

from trimkv_edge.manifest import load_manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.session_file import Origin, SessionFile, read_session

TEXT = "the cat sat on the mat and the dog sat on the log. über 你好 🙂\n" * 20
QUESTION = "where is the cat?"
DRAW = ["--temperature", "0.9", "--seed", "7"]


def command(name: str, *args: object, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    module = {"run": "trimkv_edge.cli.run", "cache": "trimkv_edge.cli.cache_prompt"}[name]
    line = [sys.executable, "-m", module, str(text_artefact()), *map(str, args)]
    done = subprocess.run(line, input=stdin.encode(), capture_output=True, timeout=120, cwd=folder)
    return subprocess.CompletedProcess(line, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    done = command("cache", "--prompt-file", "text.txt", "-o", "state", "--note-tokens", folder=folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "saved state: " in done.stderr
    return folder


def session_after(*texts: str) -> Session:
    artefact = Artefact.load(text_artefact())
    assert artefact.tokenizer is not None
    session = Session.open(artefact)
    session.feed(artefact.tokenizer.encode(texts[0]))
    for text in texts[1:]:
        session.feed(artefact.tokenizer.encode(text, add_special_tokens=False))
    return session


def text_of(session: Session, count: int, sampling: SamplingParams = SamplingParams()) -> str:  # noqa: B008
    return "".join(piece.text for piece in session.generate(count, sampling, [2]))


def test_the_state_is_that_of_the_text(cached: Path) -> None:
    artefact = Artefact.load(text_artefact())
    assert artefact.tokenizer is not None
    record = read_session(cached / "state", Origin.of(artefact.manifest))
    assert record.tokens is not None
    assert record.tokens.tolist() == artefact.tokenizer.encode(TEXT)
    assert record.state.live <= artefact.manifest.cache.slots


def test_runs_start_from_it_and_leave_it_as_it_is(cached: Path) -> None:
    before = (cached / "state").read_bytes()
    asked = command("run", "--session", "state", "--prompt", QUESTION, "--max-new-tokens", 20, folder=cached)
    assert (asked.returncode, asked.stdout) == (0, text_of(session_after(TEXT, QUESTION), 20) + "\n"), asked.stderr
    bare = command("run", "--session", "state", "--max-new-tokens", 20, folder=cached)
    assert bare.stdout == text_of(session_after(TEXT), 20) + "\n"
    assert (cached / "state").read_bytes() == before
    assert sorted(file.name for file in cached.iterdir()) == ["state", "text.txt"]


def test_drawing_goes_on_where_it_stopped_unless_told_otherwise(cached: Path, tmp_path: Path) -> None:
    state, saved = cached / "state", tmp_path / "saved"
    first = command("run", "--session", state, *DRAW, "--max-new-tokens", 12, "--save-session", saved, folder=tmp_path)
    rest = command("run", "--session", saved, "--max-new-tokens", 14, "--save-session", saved, folder=tmp_path)
    whole = session_after(TEXT)
    tokens = [piece.token for piece in whole.generate(26, SamplingParams(temperature=0.9, seed=7), [2])]
    assert 2 not in tokens
    made = Session.open(Artefact.load(text_artefact()))
    made.load(saved)
    assert (made.pending, made.engine.seen) == (tokens[-1], whole.engine.seen)
    assert made.engine.survivors().tolist() == whole.engine.survivors().tolist()
    greedy = command("run", "--session", saved, "--temperature", 0, "--max-new-tokens", 10, folder=tmp_path)
    assert greedy.stdout == text_of(whole, 10) + "\n"
    assert first.returncode == rest.returncode == 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("run", ["--session", "nowhere"], "session file nowhere cannot be read (No such file or directory)"),
        ("run", ["--session", "text.txt"], "text.txt is no session file"),
        ("run", ["--session", "cut"], "session file cut is damaged (its sha256 differs)"),
        (
            "run",
            ["--session", "state", "--chat", "--prompt", "a"],
            "--chat begins a conversation and --session goes on",
        ),
        ("run", ["--prompt", "a", "--save-session", "no/such/s"], "is a folder or lies in none"),
        ("run", ["--session", "state", "--prompt", ""], "the prompt is empty"),
        ("cache", ["--prompt-file", "nowhere", "-o", "s"], "prompt file nowhere cannot be read"),
        ("cache", ["--prompt-file", "text.txt", "-o", "."], "is a folder or lies in none"),
        ("cache", ["--prompt-file", "-", "-o", "s"], "the prompt is empty"),
        ("cache", ["--prompt-file", "text.txt", "-o", "s", "--engine", "executorch"], "has no executorch target"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(cached: Path, name: str, arguments: list[str], message: str) -> None:
    state = (cached / "state").read_bytes()
    (cached / "cut").write_bytes(state[: len(state) // 2])
    done = command(name, *arguments, folder=cached)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
    assert message in lines[0]
    (cached / "cut").unlink()


def test_a_file_in_use_is_refused_before_anything_is_read(cached: Path, tmp_path: Path) -> None:
    with SessionFile(tmp_path / "s").open():
        for name, option in (("cache", "-o"), ("run", "--save-session")):
            done = command(name, "--prompt-file", cached / "text.txt", option, tmp_path / "s", folder=tmp_path)
            assert done.returncode == 2
            assert f"is in use by process {os.getpid()}" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_what_was_made(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_artefact(), tmp_path / "artefact"))
    manifest = load_manifest(folder)
    assert manifest.tokenizer is not None
    save_manifest(folder, manifest, tokenizer=replace(manifest.tokenizer, eos_token_ids=[]))
    saved = tmp_path / "saved"
    options = ["--prompt", "the cat", "--max-new-tokens", "100000000", *DRAW, "--save-session", str(saved)]
    # The installed command: a module that is run takes the signal while it still starts.
    line = [Path(sys.executable).with_name("trimkv-run"), str(folder), *options]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.read(200)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    made, fresh = (Session.open(Artefact.load(folder)) for _ in range(2))
    made.load(saved)
    artefact = Artefact.load(folder)
    assert artefact.tokenizer is not None
    fresh.feed(artefact.tokenizer.encode("the cat"))
    count = made.engine.seen - fresh.engine.seen + (made.pending is not None)
    drawn = list(fresh.generate(count, SamplingParams(temperature=0.9, seed=7)))
    assert made.pending in (None, drawn[-1].token)
    # The signal may come after an event or a step and before what follows it: compared once both went on.
    after = [[piece.token for piece in session.generate(2)] for session in (made, fresh)]
    assert after[0] == after[1]
    assert made.engine.seen == fresh.engine.seen
    assert made.engine.survivors().tolist() == fresh.engine.survivors().tolist()
