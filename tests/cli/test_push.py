"""Uploads as a user meets them: from an export, and of an artefact that exists."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from factories import base_config
from hub_server import TOKEN, Hub, serve
from huggingface_hub import constants
from small_manifest import FILES, small_artefact

from trimkv_edge.cli import export, push
from trimkv_edge.export import pipeline

PUSH = [sys.executable, "-m", "trimkv_edge.cli.push"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub()) as running:
        yield running


def run(hub: Hub, *command: str, cwd: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    more = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "hf")}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **more}, timeout=300, check=False
    )


def test_help_teaches(hub: Hub, tmp_path: Path) -> None:
    shown = run(hub, *PUSH, "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for part in ("examples:", "--private", "--hub-revision", "hf auth login"):
        assert part in shown.stdout


def test_an_artefact_goes_up(hub: Hub, tmp_path: Path) -> None:
    made = small_artefact(tmp_path / "small")
    shown = run(hub, *PUSH, "small", "team/small", "--private", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    repo = hub.repos["team/small"]
    assert shown.stdout.splitlines() == [
        "hub       team/small (main), as ada",
        f"pushed    {hub.endpoint}/team/small/commit/{repo.sha('main')}",
    ]
    assert repo.private
    assert repo.files().keys() == {*made.files, "manifest.json", ".gitattributes"}
    assert "%|" not in shown.stderr  # no bars where nobody looks


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["nowhere", "ada/small"], TOKEN, "no artefact at nowhere"),
        (["small", "small"], TOKEN, "give OWNER/NAME"),
        (["small", "bob/small"], TOKEN, "cannot write to bob/"),
        (["small", "ada/small"], "hf_wrong", "does not accept the token (401)"),
        (["small", "ada/small"], "", "there is no token of the hub"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    hub: Hub, tmp_path: Path, arguments: list[str], token: str, message: str
) -> None:
    small_artefact(tmp_path / "small")
    shown = run(hub, *PUSH, *arguments, cwd=tmp_path, token=token)
    assert shown.returncode == 2
    assert len(shown.stderr.splitlines()) == 1
    assert shown.stderr.startswith("error: ")
    assert message in shown.stderr
    assert hub.repos == {}


@pytest.fixture
def hub_here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The stand-in for commands that run in this process: importing torch once is enough."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    base_config("qwen3-gqa").save_pretrained(tmp_path / "model")
    return hub


EXPORT = ["--model", "model", "--random-weights", "--budget", "16", "--buffer", "8", "--target", "onnx", "-o", "out"]


def ends_with_2(capsys: pytest.CaptureFixture[str], command: Callable[[], None]) -> str:
    """The one error line."""
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_export_whose_upload_fails_is_kept_and_can_be_pushed(
    hub_here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export itself runs in the next test.
    monkeypatch.setattr(pipeline, "run_export", lambda plan, *_: small_artefact(plan.request.output))
    hub_here.fail["POST", "/commit/"] = 500
    line = ends_with_2(capsys, lambda: export.main([*EXPORT, "--push-to-hub", "ada/small", "--private"]))
    assert "the hub answered 500" in line
    assert (tmp_path / "out" / "manifest.json").is_file()
    advice = shlex.split(line.rpartition("upload it with: ")[2])
    assert advice == ["trimkv-push", "out", "ada/small", "--private"]
    hub_here.fail.clear()
    push.main(advice[1:])
    sent = dict(hub_here.repos["ada/small"].files())
    assert sent.pop(".gitattributes") == b"\n"
    assert sent == {
        **FILES,
        **{name: (tmp_path / "out" / name).read_bytes() for name in ("README.md", "manifest.json")},
    }


def test_an_export_pushes_when_it_is_done(hub_here: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    export.main([*EXPORT, "--push-to-hub", "team/small", "--hub-revision", "b16"])
    shown = capsys.readouterr().out.splitlines()
    repo = hub_here.repos["team/small"]
    assert "hub       team/small (b16), as ada" in shown
    assert shown[-1] == f"pushed    {hub_here.endpoint}/team/small/commit/{repo.sha('b16')}"
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert repo.files("b16") == {**made, ".gitattributes": b"\n"}
    graphs = {"decoder.onnx", "decoder.onnx.data", "gates.onnx", "gates.onnx.data", "evict.onnx"}
    assert made.keys() == {"README.md", "manifest.json", *graphs}


def test_an_export_asks_the_hub_first(hub_here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ends_with_2(capsys, lambda: export.main([*EXPORT, "--push-to-hub", "bob/small"]))
    assert "cannot write to bob/" in line
    assert "give OWNER/NAME" in ends_with_2(capsys, lambda: export.main([*EXPORT, "--push-to-hub", "small"]))
    for alone in (["--private"], ["--hub-revision", "b16"]):
        line = ends_with_2(capsys, lambda alone=alone: export.main([*EXPORT, *alone]))
        assert "give --push-to-hub OWNER/NAME too" in line
    assert not (tmp_path / "out").exists()
    export.main([*EXPORT, "--push-to-hub", "ada/small", "--dry-run"])
    assert "hub       ada/small (main), as ada" in capsys.readouterr().out
    assert hub_here.repos == {}
