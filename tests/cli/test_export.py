"""The command as a user meets it: one line and exit code 2 for bad input, 130 for Ctrl-C, nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factories import base_config

from trimkv_edge.cli.export import main

COMMAND = [sys.executable, "-m", "trimkv_edge.cli.export"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_config("qwen3-gqa").save_pretrained(folder)
    return folder


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


def test_help_teaches(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for part in ("--budget", "examples:", "what would it cost?", "--random-weights"):
        assert part in shown.stdout


def test_dry_run_estimates_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model), "--random-weights", "--budget", "100KB", "--buffer", "16", "--dry-run")
    shown = run(*arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    # (102400 - 16 x 4 x 260) // (4 x 260 + 4 x 8) entries.
    assert "80 kept + 16 new entries per head" in shown.stdout
    assert "to export about" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_random_weights_say_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMKV_CACHE", str(tmp_path / "cache"))
    shown = run("--model", "phi-3-mini", "--random-weights", "--seed", "7", "--dry-run", cwd=tmp_path)
    # 3,821,079,552 parameters of 2 bytes.
    expected = f"weights   random, seed 7: 7.12 GiB in {tmp_path / 'cache' / 'random-weights' / 'phi-3-mini-'}"
    assert expected in shown.stdout, shown.stderr
    assert "-seed7, to be written" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    arguments = ("--model", "phi-3-mini", "--random-weights", "--rope", "short", "--stream-length", "5000")
    refused = run(*arguments, "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "right for 4096 tokens, but the stream length is 5000" in refused.stderr


def test_streaming_has_the_published_sinks_unless_told(model: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model), "--random-weights", "--buffer", "16", "--dry-run", "--policy", "streaming")
    shown = run(*arguments, cwd=tmp_path).stdout
    assert "policy    streaming, 4 sinks\n" in shown
    assert "parameters without gates" in shown
    assert "policy    streaming\n" in run(*arguments, "--sinks", "0", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "12"], "smaller than one prefill chunk"),
        (["--buffer", "64", "--prefill-chunk", "128"], "prefill chunk 128 is larger than the buffer 64"),
        (["--budget", "900GB"], "of memory are available"),
        (["--budget", "lots"], "neither entries per head (512) nor a size"),
        (["--buffer", "0"], "buffer is 0"),
        (["--target", "coreml"], "target 'coreml' is not known"),
        (["--gates", "none.safetensors"], "no gate file at none.safetensors"),
        (["--rope", "long"], "needs a LongRoPE model"),
        (["--stream-length", "100"], "a stream length only chooses LongRoPE factors"),
        (["--seed", "-1"], "seed is -1"),
        (["--policy", "h2o"], "export one of trimkv, global, layer, streaming, keydiff, random"),
        (["--gates", "none"], "policy trimkv ranks by retention gates"),
        (["--policy", "global", "--threshold", "0.1"], "say how much the cache may hold with --budget"),
        (["--policy", "global", "--min-per-head", "600"], "min per head 600 needs more entries than the budget of 512"),
        (["--policy", "global", "--caps", "none.json"], "none.json does not exist: make it with trimkv-calibrate"),
        (["--policy", "global", "--caps-target", "lots"], "--caps-target 'lots' is not a share"),
        (["--policy", "global", "--caps-target", "150%"], "target is 1.5"),
        (["--caps", "auto"], "--caps is for policies whose heads share a budget (global, layer), not for trimkv"),
        (["--min-per-head", "4"], "share a budget (global, layer), not for trimkv"),
        (["--quant", "half"], "quantisation 'half' is not known; use one of none, fp16, bf16, int8, int4, 8da4w"),
        (["--quant", "fp16"], "executorch cannot run fp16 weights: use one of none, int8, 8da4w or --target onnx"),
        (["--quant", "fp16", "--target", "onnx", "--kv-dtype", "float32"], "--quant fp16 keeps float16 keys"),
        (["--kv-dtype", "float16"], "--quant none keeps float32 or int8 keys and values, not float16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    # In this process: a new one takes seconds to import torch. The next test is of a process.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(model), "--random-weights", *arguments])
    assert stop.value.code == 2
    shown = capfd.readouterr().err
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in shown
    assert not any((tmp_path / "artefacts").glob("*"))


def test_unknown_models_say_what_to_give(tmp_path: Path) -> None:
    shown = run("--model", "gpt-5", cwd=tmp_path)
    assert shown.returncode == 2
    assert "known names: tiny, tiny-vl, phi-3-mini" in shown.stderr
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    shown = run("--model", ".", cwd=tmp_path)
    assert shown.returncode == 2
    assert "'bert' is not supported; supported families" in shown.stderr


def test_ctrl_c_during_export_leaves_nothing(model: Path, tmp_path: Path) -> None:
    # The installed command: where Ctrl-C meets a library that runs `exec` on a string, `python -m` ends by the signal
    # itself (-2), whatever code was asked for.
    command = Path(sys.executable).with_name("trimkv-export")
    arguments = [command, "--model", str(model), "--random-weights", "--budget", "128", "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "exporting to executorch" in line:
                break
        time.sleep(2)
        assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []
