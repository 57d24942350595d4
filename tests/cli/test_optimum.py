"""``optimum-cli export trimkv`` as its users meet it: found by optimum, with the options and exit codes of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def _optimum_missing() -> bool:
    try:
        version("optimum")
    except PackageNotFoundError:
        return True
    return False


needs_optimum = pytest.mark.skipif(
    _optimum_missing(), reason="optimum is not installed: pip install 'trimkv-edge[optimum]'"
)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    name, *arguments = command
    return subprocess.run([BIN / name, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


def options(help_text: str) -> list[str]:
    return re.findall(r"^  (?:-\w[^-]*, )?(--[\w-]+)", help_text, re.MULTILINE)


@needs_optimum
def test_it_is_listed_and_has_every_option(tmp_path: Path) -> None:
    assert re.search(r"^    trimkv +Export a model", run("optimum-cli", "export", "--help", cwd=tmp_path).stdout, re.M)
    theirs = run("optimum-cli", "export", "trimkv", "--help", cwd=tmp_path)
    ours = run("trimkv-export", "--help", cwd=tmp_path)
    assert theirs.returncode == ours.returncode == 0
    assert {"--model", "--budget", "--push-to-hub", "--dry-run"} <= set(options(ours.stdout))
    assert options(theirs.stdout) == options(ours.stdout)
    assert "optimum-cli export trimkv --model tiny -o artefacts/tiny" in theirs.stdout
    assert "trimkv-export" not in theirs.stdout


@needs_optimum
def test_a_dry_run_of_tiny(tmp_path: Path) -> None:
    shown = run("optimum-cli", "export", "trimkv", "--model", "tiny", "--budget", "256", "--dry-run", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "256 kept + 128 new entries per head" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@needs_optimum
@pytest.mark.parametrize("arguments", [[], ["--model", "tiny", "--private"], ["--model", "tiny", "--no-such-option"]])
def test_wrong_options_end_with_2(arguments: list[str], tmp_path: Path) -> None:
    shown = run("optimum-cli", "export", "trimkv", *arguments, cwd=tmp_path)
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr


def test_our_command_works_without_optimum(tmp_path: Path) -> None:
    # None in sys.modules makes every import of it fail.
    code = (
        "import sys; sys.modules['optimum'] = None\n"
        "from trimkv_edge.cli.export import build_parser\n"
        "print(build_parser().parse_args(['--model', 'tiny']).model)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert shown.stdout == "tiny\n"
