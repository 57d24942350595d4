"""``trimkv-inspect`` as a process over a real engine: its files, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command import Run, command
from text_artefact import save_manifest, text_artefact

from trimkv_edge.cli.inspect import main
from trimkv_edge.manifest import load_manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session

LONG = "the cat sat on the mat and the dog sat on the log. über 你好 🙂 </script>\n" * 12
COMMAND = [sys.executable, "-m", "trimkv_edge.cli.inspect"]
RANDOM = "warning: this artefact has random weights: its text means nothing"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return command([*COMMAND, str(text_artefact())], tmp_path)


def data_of(page: Path) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    data: dict[str, object] = json.loads(found[1])
    return data


def stream(prompt: str, count: int, sampling: SamplingParams = SamplingParams()) -> tuple[Session, list[int]]:  # noqa: B008
    """A session that has read what a report shows, and its tokens."""
    artefact = Artefact.load(text_artefact())
    assert artefact.tokenizer is not None
    session = Session.open(artefact)
    tokens = artefact.tokenizer.encode(prompt)
    session.feed(tokens)
    made = [piece.token for piece in session.generate(count + 1, sampling, [2])]
    return session, [*tokens, *made][: session.engine.seen]


def test_the_page_and_the_numbers_are_those_of_the_stream(run: Run, tmp_path: Path) -> None:
    drawing = ["--temperature", 1.2, "--seed", 3, "--max-new-tokens", 30]
    done = run("--prompt", LONG, *drawing, "--json", "numbers.json", "--engine", "onnx")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    session, tokens = stream(LONG, 30, SamplingParams(1.2, seed=3))
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["tokens"] == tokens
    assert numbers["events"] == list(range(32, len(tokens) + 1, 8))
    assert [chunk["seen"] for chunk in numbers["chunks"]][-1] == len(tokens)
    # What has no end is what the engine holds at the end.
    held = session.engine.survivors()
    for layer, heads in enumerate(numbers["left"]):
        for head, left in enumerate(heads):
            kept = [position for position, at in enumerate(left) if at is None]
            assert kept == sorted(held[layer, head].tolist())
    page = tmp_path / "report.html"
    data = data_of(page)
    assert data["events"] == numbers["events"]
    text = "".join(str(part) for part in data["text"])  # type: ignore[attr-defined]
    assert LONG in text
    facts = dict(data["facts"])  # type: ignore[call-overload]
    assert (facts["engine"], facts["policy"], facts["budget"]) == ("onnx", "trimkv, gates rg", "24 entries per head")
    assert facts["tokens"] == f"{len(tokens)}, {len(tokens) - numbers['prompt_tokens']} of them generated"
    assert data["notes"] == ["this artefact has random weights: what it keeps means nothing"]
    title = re.search("<title>(.*?)</title>", page.read_text(encoding="utf-8"))
    assert title
    assert unescape(title[1]) == f"{text_artefact().name}: what the cache holds"
    lines = done.stderr.splitlines()
    assert lines[0] == RANDOM
    assert re.fullmatch(
        rf"wrote report.html \(\d+\.\d KiB\), numbers.json: {len(tokens)} tokens, {len(numbers['events'])} events",
        lines[1],
    )


def test_prompts_come_from_text_file_and_standard_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(LONG, encoding="utf-8")
    texts = []
    for number, arguments in enumerate((["--prompt", LONG], ["--prompt-file", "prompt.txt"], ["-"])):
        done = run(*arguments, "-o", f"{number}.html", stdin=LONG.encode())
        assert done.returncode == 0, done.stderr
        texts.append(data_of(tmp_path / f"{number}.html")["text"])
    assert texts[0] == texts[1] == texts[2]
    assert data_of(tmp_path / "0.html")["promptTokens"] == data_of(tmp_path / "0.html")["tokens"]


def test_chat_goes_through_the_template(run: Run, tmp_path: Path) -> None:
    artefact = Artefact.load(text_artefact())
    assert artefact.chat_template is not None
    assert artefact.tokenizer is not None
    prompt = render_chat(artefact.chat_template, [{"role": "user", "content": "the cat"}], {"bos_token": "<s>"})
    assert run("--prompt", "the cat", "--chat").returncode == 0
    data = data_of(tmp_path / "report.html")
    assert "".join(data["text"]) == prompt  # type: ignore[arg-type]
    assert data["special"] == [0]


def test_plots(run: Run, tmp_path: Path) -> None:
    import matplotlib.image

    done = run("--prompt", LONG, "--png", "plots", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    assert ", 5 plots in plots: " in done.stderr
    pictures = {path.name: matplotlib.image.imread(path) for path in (tmp_path / "plots").iterdir()}
    assert sorted(pictures) == [f"{name}.png" for name in ("events", "heads", "machine", "retention", "stream")]
    for name, picture in pictures.items():
        # Neither blank nor a single frame: hundreds of colours, and ink in the middle.
        assert min(picture.shape[:2]) > 300, name
        middle = picture[picture.shape[0] // 4 : -picture.shape[0] // 4, picture.shape[1] // 4 : -picture.shape[1] // 4]
        assert (middle[..., :3].min(-1) < 0.8).mean() > 0.001, name


def test_plots_without_matplotlib_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    done = run("--prompt", "a", "--png", "plots", PYTHONPATH=str(tmp_path))
    assert_refused(done, "pip install 'trimkv-edge[inspect]'")
    assert not (tmp_path / "plots").exists()
    # Without plots nothing asks for it.
    assert run("--prompt", LONG, PYTHONPATH=str(tmp_path)).returncode == 0


def test_a_long_text_shows_some_heads_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session, tokens = stream(LONG, 0)
    monkeypatch.setattr("trimkv_edge.runtime.report.page.MOST_ENTRIES", 3 * len(tokens))  # of 2 layers x 2 heads
    page, numbers = tmp_path / "some.html", tmp_path / "some.json"
    main([str(text_artefact()), "--prompt", LONG, "-o", str(page), "--json", str(numbers)])
    data = data_of(page)
    note = "the text is long: the page shows 1 of 2 KV heads of each layer, evenly spaced"
    assert (data["heads"], data["kvHeads"]) == ([0], 2)
    assert note in data["notes"]  # type: ignore[operator]
    assert f"warning: {note}" in capsys.readouterr().err.splitlines()
    left = json.loads(numbers.read_text())["left"]
    assert [len(heads) for heads in left] == [1, 1]
    kept = [[position for position, at in enumerate(heads[0]) if at is None] for heads in left]
    assert kept == np.sort(session.engine.survivors()[:, 0]).tolist()


def test_an_old_page_is_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert run("--prompt", LONG).returncode == 0
    assert data_of(tmp_path / "report.html")["layers"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompt once"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "-o", "no/such/report.html"], "-o no/such/report.html lies in no existing folder"),
        (["--prompt", "a", "-o", "."], "-o . is a folder"),
        (["--prompt", "a", "--json", "no/such/x.json"], "--json no/such/x.json lies in no existing folder"),
        (["--prompt", "a", "--json", "report.html"], "-o and --json are both report.html"),
        (["--prompt", "a", "--png", "a-file"], "--png a-file is a file: give a folder"),
        (["--prompt", "a", "--engine", "executorch"], "has no executorch target, only onnx"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--prompt", "a", "--max-new-tokens", "200001"], "tokens are more than a page of 2 layers can show"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "a-file").write_text("")
    assert_refused(run(*arguments), message)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_writes_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_artefact(), tmp_path / "artefact"))
    manifest = load_manifest(folder)
    assert manifest.tokenizer is not None
    save_manifest(folder, manifest, tokenizer=replace(manifest.tokenizer, eos_token_ids=[]))
    work = tmp_path / "work"
    work.mkdir()
    options = ["--prompt", "the cat", "--max-new-tokens", "100000", "--temperature", "1", "--seed", "1", "--progress"]
    with subprocess.Popen([*COMMAND, str(folder), *options], stderr=subprocess.PIPE, cwd=work) as process:
        assert process.stderr is not None
        seen = b""
        while b"tok/s" not in seen:
            seen += os.read(process.stderr.fileno(), 4096)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    assert rest.decode().splitlines()[-1] == "interrupted"
    assert list(work.iterdir()) == []
