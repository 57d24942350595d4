"""Node and the packages of ``examples/web``, for tests of what runs there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WEB = Path(__file__).parents[1] / "examples" / "web"
REQUIRED = "TRIMKV_REQUIRE_WEB"


def need_node() -> str:
    """Node's path. Without it the test is skipped; with ``TRIMKV_REQUIRE_WEB=1`` it fails."""
    return shutil.which("node") or _give_up("this test needs Node 20.11 or newer: apt-get install nodejs npm")


def need_packages() -> str:
    """As :func:`need_node`, with the packages that ``package.json`` names."""
    node = need_node()
    if not (WEB / "node_modules" / "onnxruntime-web").is_dir():
        _give_up(f"this test needs the packages of examples/web: npm ci --ignore-scripts --prefix {WEB}")
    return node


def _give_up(reason: str) -> str:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def run_node(*arguments: str | Path) -> str:
    """Runs a script of ``examples/web``; its output."""
    done = subprocess.run(
        [need_node(), *map(str, arguments)], cwd=WEB, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(artefact: Path) -> Iterator[str]:
    """The example's own server at a free port until the block ends; its address."""
    with subprocess.Popen(
        [need_packages(), "serve.js", str(artefact), "0"], cwd=WEB, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
