"""``trimkv-run --model``: a gated model without an export says what the eager engine says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimkv_edge.cli.run import main
from trimkv_edge.config import CacheConfig
from trimkv_edge.models.eager import eager_engine
from trimkv_edge.models.loading import load_model
from trimkv_edge.models.source import find_source
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.tokenizer import TextTokenizer

PROMPT = "The pocket is deer. The studio is lion. The lamp is teal.\n" * 30
MODEL = ("--engine", "torch", "--model", "tiny", "--no-compile", "--threads", 1)
SMALL = ("--budget", 64, "--buffer", 32)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """In this process: importing torch takes longer than the model."""

    def call(*arguments: object) -> Done:
        code = 0
        try:
            main(list(map(str, arguments)))
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return call


Run = Callable[..., Done]


def expected(config: CacheConfig, count: int, gates: str = "rg") -> tuple[str, int]:
    """What the eager engine says, and events of the prompt."""
    source = find_source("tiny")
    assert source.folder is not None
    tokenizer = TextTokenizer(source.folder / "tokenizer.json")
    session = Session(eager_engine(load_model(source, gates).model, config), tokenizer)
    session.feed(tokenizer.encode(PROMPT))
    eos = source.config.eos_token_id
    return "".join(
        piece.text for piece in session.generate(count, SamplingParams(), [eos])
    ), session.statistics().as_dict()["events"]


def test_it_says_what_the_eager_engine_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    want, events = expected(CacheConfig(64, 32, 32), 20)
    assert events >= 5
    for arguments in (("--prompt", PROMPT), ("-",)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        done = run(*MODEL, *SMALL, *arguments, "--max-new-tokens", 20, "--stats", "json")
        assert (done.returncode, done.stdout) == (0, want + "\n"), done.stderr
        (told,) = done.stderr.splitlines()
        assert json.loads(told)["engine"] == "torch"
        assert json.loads(told)["events"] >= events


def test_settings_reach_the_cache(run: Run) -> None:
    config = CacheConfig(48, 16, 8, sinks=2, recent=3)
    want, _ = expected(config, 20, "rg10")
    settings = ("--budget", 48, "--buffer", 16, "--prefill-chunk", 8, "--sinks", 2, "--recent", 3, "--gates", "rg10")
    done = run(*MODEL, *settings, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert (done.returncode, done.stdout) == (0, want + "\n"), done.stderr


def test_heads_may_share_a_budget(run: Run) -> None:
    config = CacheConfig(64, 32, 32, policy="global", min_per_head=8)
    want, events = expected(config, 20, "rg10")
    assert events >= 5
    settings = (*SMALL, "--policy", "global", "--min-per-head", 8)
    done = run(*MODEL, *settings, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert (done.returncode, done.stdout) == (0, want + "\n"), done.stderr


def test_a_session_goes_on_in_the_same_settings_only(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "a.session"
    done = run(*MODEL, *SMALL, "--prompt", PROMPT, "--max-new-tokens", 4, "--save-session", state)
    assert done.returncode == 0, done.stderr
    first = done.stdout.rstrip("\n")
    done = run(*MODEL, *SMALL, "--session", state, "--max-new-tokens", 16)
    assert (done.returncode, first + done.stdout) == (0, expected(CacheConfig(64, 32, 32), 20)[0] + "\n"), done.stderr
    done = run(*MODEL, "--budget", 96, "--buffer", 32, "--session", state, "--max-new-tokens", 4)
    assert done.returncode == 2
    assert "budget" in done.stderr


@pytest.mark.parametrize("settings", [("--dtype", "bfloat16"), ("--quant", "int8"), ("--policy", "streaming")], ids=str)
def test_other_numbers_and_policies_run(run: Run, settings: tuple[str, ...]) -> None:
    done = run(*MODEL, *SMALL, *settings, "--prompt", PROMPT, "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give what to run once: an ARTEFACT folder, or --model NAME"),
        (("artefacts/x", "--model", "tiny"), "give what to run once"),
        (("artefacts/x", "--budget", 64), "--budget is for --model"),
        (("artefacts/x", "--no-compile"), "--no-compile is for --model"),
        (("--model", "tiny", "--engine", "onnx"), "--model runs in the torch engine, not in onnx"),
        (("--model", "tiny", "--profile"), "--profile is for artefacts"),
        (("--model", "tiny", "--policy", "h2o"), "h2o never evicts or looks at attention"),
        (("--model", "tiny", "--threshold", 0.5), "threshold is for policies whose heads share a budget"),
        (("--model", "tiny", "--quant", "8da4w", "--no-compile"), "does not round weights to '8da4w'"),
        (("--model", "tiny", "--device", "tpu"), "device 'tpu' is not known"),
        (("--model", "tiny", "--budget", 10**12), "of memory are available: lower --budget"),
        (("--model", "nowhere"), "no such folder, and not a known name"),
        (("--model", "tiny", "--gates", "none"), "ranks by retention gates"),
    ],
)
def test_mistakes_end_with_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, "--prompt", "x")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
