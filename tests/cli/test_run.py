"""``trimkv-run`` as a user meets it: a process with arguments, files and pipes, over a real engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command import Run, command
from text_artefact import save_manifest, text_artefact

from trimkv_edge.manifest import load_manifest
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.chat import render_chat
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session

LONG = "the cat sat on the mat and the dog sat on the log. über 你好 🙂\n" * 20
COMMAND = [sys.executable, "-m", "trimkv_edge.cli.run"]


@pytest.fixture
def original() -> Path:
    return text_artefact()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "artefact"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return command(COMMAND, tmp_path)


def expected(folder: Path, prompt: str, count: int, sampling: SamplingParams = SamplingParams()) -> str:  # noqa: B008
    artefact = Artefact.load(folder)
    assert artefact.tokenizer is not None
    session = Session.open(artefact)
    session.feed(artefact.tokenizer.encode(prompt))
    return "".join(piece.text for piece in session.generate(count, sampling, [2]))


def test_prompts_come_from_text_file_and_standard_input(original: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(LONG, encoding="utf-8")
    want = expected(original, LONG, 30) + "\n"
    assert want.strip()
    for arguments in (["--prompt", LONG], ["--prompt-file", file], ["--temperature", 0, "-"], ["--prompt-file", "-"]):
        done = run(original, *arguments, "--max-new-tokens", 30, stdin=LONG.encode())
        assert (done.returncode, done.stdout) == (0, want), done.stderr
        assert done.stderr == "warning: this artefact has random weights: its text means nothing\n"


def test_drawing_repeats_with_a_seed_and_uses_every_setting(original: Path, run: Run) -> None:
    sampling = SamplingParams(0.9, 50, 0.95, 0.01, 1.1, seed=7)
    chosen = {"--temperature": 0.9, "--top-k": 50, "--top-p": 0.95, "--min-p": 0.01, "--repetition-penalty": 1.1}
    options = [word for option in {**chosen, "--seed": 7}.items() for word in option]
    done = run(original, "--prompt", LONG, "--max-new-tokens", 20, *options)
    assert done.stdout == expected(original, LONG, 20, sampling) + "\n"


def test_statistics_as_json_text_and_file(original: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    arguments = [original, "--prompt", LONG, "--max-new-tokens", 5, "--threads", 1, "--engine", "onnx"]
    done = run(*arguments, "--stats", "json", "--stats-file", file)
    found = json.loads(done.stderr.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert (found["engine"], found["new_tokens"], found["max_entries"], found["cache_bytes"]) == ("onnx", 5, 32, 1000)
    assert found["events"] == (found["position"] - 32) // 8 + 1
    assert 0 < found["rss_bytes"] <= found["peak_rss_bytes"] < 400 * 2**20
    lines = run(*arguments, "--stats", "text", "--no-verify").stderr.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["engine", "prompt", "new", "evictions", "cache", "memory"]


def test_progress_shows_tokens_per_second_and_memory(original: Path, run: Run) -> None:
    done = run(original, "--prompt", LONG, "--max-new-tokens", 1, "--progress")
    assert "tok/s" in done.stderr
    assert "memory" in done.stderr
    assert "MiB" in done.stderr


def test_chat_goes_through_the_template(original: Path, run: Run) -> None:
    artefact = Artefact.load(original)
    assert artefact.tokenizer is not None
    assert artefact.chat_template is not None
    prompt = render_chat(artefact.chat_template, [{"role": "user", "content": LONG}], {"bos_token": "<s>"})
    done = run(original, "--prompt", LONG, "--chat", "--max-new-tokens", 10)
    assert done.stdout == expected(original, prompt, 10) + "\n"


def test_stop_strings_may_be_escaped(original: Path, run: Run) -> None:
    text = expected(original, LONG, 40)
    stop = text[10:13]
    written = stop.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    done = run(original, "--prompt", LONG, "--max-new-tokens", 40, "--stop", written, "--stop", "neverever")
    assert done.stdout.rstrip("\n") == text[: text.index(stop)].rstrip("\n")


def test_help_teaches_with_examples(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.count("trimkv-run artefacts/") >= 3


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"schema_version": 1, \xff')


def unknown_schema(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "schema_version": 99}))


def wrong_hash(folder: Path) -> None:
    path = folder / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def truncated(folder: Path) -> None:
    path = folder / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:1000])


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    save_manifest(folder, load_manifest(folder, verify_files=False))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    save_manifest(folder, load_manifest(folder, verify_files=False), tokenizer=None)


def huge(folder: Path) -> None:
    manifest = load_manifest(folder)
    save_manifest(folder, manifest, bytes=replace(manifest.bytes, peak=2**50))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "no artefact at"),
        (no_manifest, "holds no manifest.json"),
        (broken_manifest, "cannot be read as JSON"),
        (unknown_schema, "schema version 99, but this trimkv-edge reads version 1"),
        (wrong_hash, "decoder.onnx.data has sha256"),
        (truncated, "decoder.onnx has 1000 bytes, but the manifest says"),
        (no_template, "has no chat_template.jinja"),
        (no_tokenizer, "has no tokenizer"),
        (huge, "of memory are available"),
    ],
)
def test_a_damaged_artefact_is_one_line_and_exit_2(
    folder: Path, run: Run, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    assert_refused(run(folder, "--prompt", "the cat", "--chat"), message)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert done.stdout == ""


def test_a_truncated_graph_is_one_line_even_unverified(folder: Path, run: Run) -> None:
    truncated(folder)
    assert_refused(run(folder, "--prompt", "the cat", "--no-verify"), "decoder.onnx does not load")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompt once"),
        (["--prompt", "a", "-"], "give the prompt once"),
        (["--prompt", ""], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        (["--prompt-file", "nowhere.txt"], "prompt file nowhere.txt cannot be read: No such file or directory"),
        (["--prompt-file", "."], "prompt file . cannot be read: Is a directory"),
        (["--prompt-file", "latin1.txt"], "prompt file latin1.txt is not UTF-8 text: byte 0xfc at offset 4"),
        (["--prompt", b"a\xff"], "not valid Unicode at character 1"),
        (["--prompt", "a", "--engine", "tensorrt"], "engine 'tensorrt' is not known; use one of onnx, executorch"),
        (["--prompt", "a", "--engine", "executorch"], "has no executorch target, only onnx"),
        (["--prompt", "a", "--threads", "0"], "threads is 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-p", "0"], "top-p is 0.0"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--stats-file", "no/such/folder/s.json"], "lies in no existing folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    original: Path, tmp_path: Path, run: Run, arguments: list[str | bytes], message: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("abc für".encode("latin-1").replace(b"f", b""))
    assert_refused(run(original, *(os.fsdecode(argument) for argument in arguments)), message)


def test_options_that_argparse_refuses_are_exit_2(original: Path, run: Run) -> None:
    done = run(original, "--prompt", "a", "--top-k", "many")
    assert done.returncode == 2
    assert "invalid int value: 'many'" in done.stderr


def test_debug_shows_the_traceback(original: Path, run: Run) -> None:
    done = run(original, "--prompt", "", TRIMKV_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError: the prompt is empty" in done.stderr


@pytest.fixture
def endless(folder: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that generates for ever and has begun to."""
    manifest = load_manifest(folder)
    assert manifest.tokenizer is not None
    save_manifest(folder, manifest, tokenizer=replace(manifest.tokenizer, eos_token_ids=[]))
    options = ["--prompt", "the cat", "--max-new-tokens", "100000000", "--temperature", "1", "--seed", "1"]
    return subprocess.Popen(
        [Path(sys.executable).with_name("trimkv-run"), str(folder), *options, "--stats", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_the_text_so_far(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None
    first = endless.stdout.read(30)
    endless.send_signal(signal.SIGINT)
    rest, errors = endless.communicate(timeout=60)
    lines = errors.decode().splitlines()
    assert endless.returncode == 130, errors
    assert lines[-1] == "interrupted"
    assert "Traceback" not in errors.decode()
    assert (first + rest).endswith(b"\n")
    assert json.loads(lines[-2])["new_tokens"] > 10


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_reader_that_goes_away_ends_it_quietly(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None
    assert endless.stderr is not None
    endless.stdout.read(10)
    endless.stdout.close()
    errors = endless.stderr.read().decode()
    assert endless.wait(timeout=60) == 141
    assert [line.split()[0] for line in errors.splitlines()] == ["warning:", '{"engine":']
