"""Environments, weights and builds: each is made once, beside its place, and found again by the next run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from host import log_end
from registry import ENVIRONMENTS, HERE, Peer
from shapes import SHAPES

from trimkv_edge.files import new_folder

BUILT = HERE / "built"
_DONE = "done.json"
_SERVED = ("verify", "cache", "dtype", "compile", "flash")  # options that make no other build


class BuildError(Exception):
    """A peer cannot be built; the message says what to do."""


def set_up(peer: Peer) -> None:
    """Makes a peer's environment with its pinned packages.

    Raises:
        BuildError: pip failed.
    """
    if peer.environment is None:
        return
    folder = ENVIRONMENTS / peer.environment
    if not peer.python.exists():
        venv.create(folder, with_pip=True)
    done = subprocess.run([peer.python, "-m", "pip", "install", "--quiet", *peer.requirements], check=False)
    if done.returncode:
        raise BuildError(f"pip could not install {' '.join(peer.requirements)} into {folder}")
    (folder / "requirements.txt").write_text("\n".join(peer.requirements) + "\n", encoding="utf-8")


def check_installed(name: str, peer: Peer) -> None:
    """Raises :class:`BuildError` with the command to run if an environment is missing or has other packages."""
    if peer.environment is None:
        return
    listed = ENVIRONMENTS / peer.environment / "requirements.txt"
    if not listed.is_file() or listed.read_text().split() != list(peer.requirements):
        raise BuildError(f"not installed: python benchmarks/peers/run.py --setup --peers {name}")


def weights_folder(shape: str) -> Path:
    """The folder of random weights of a shape, made if it does not exist.

    Raises:
        BuildError: it could not be made.
    """
    folder = BUILT / shape / "weights"
    if not folder.is_dir():
        print(f"making {folder.relative_to(HERE)}: {SHAPES[shape].parameters / 1e6:.0f} M parameters", flush=True)
        with new_folder(folder) as partial:
            _run([sys.executable, str(HERE / "weights.py"), shape, str(partial)], _log(shape, "weights"))
    return folder


def forget(peer: Peer, shape: str) -> None:
    """Removes the builds of a peer's worker, so that they are made again."""
    for done in (BUILT / shape).glob(f"{_worker(peer)}-*/{_DONE}"):
        if json.loads(done.read_text()).get("engine") == peer.options.get("engine"):
            shutil.rmtree(done.parent)


def _worker(peer: Peer) -> str:
    return peer.script.stem.removeprefix("worker_")


def built(name: str, peer: Peer, shape: str, scheme: str, options: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder of a peer's build, made if it does not exist, and what was noted about it.

    Raises:
        BuildError: not installed, or its builder failed; nothing half-made is left.
    """
    check_installed(name, peer)
    settings = {"scheme": scheme, **{key: options[key] for key in sorted(options) if key not in _SERVED}}
    folder = BUILT / shape / "-".join([_worker(peer), *settings.values()])
    if not (folder / _DONE).is_file():
        weights = weights_folder(shape)
        print(f"building {folder.relative_to(HERE)} ...", flush=True)
        started = time.perf_counter()
        with new_folder(folder) as partial:
            command = [str(peer.python), str(peer.script), "build", "--weights", str(weights)]
            command += ["--output", str(partial), "--quant", scheme]
            command += [f"--option={key}={value}" for key, value in options.items()]
            peak = _run(command, _log(shape, folder.name))
            note = {"build_s": time.perf_counter() - started, "build_peak_rss": peak, "file_bytes": _size(partial)}
            (partial / _DONE).write_text(json.dumps({**settings, **note}) + "\n", encoding="utf-8")
        print(f"  in {note['build_s']:.0f} s, {note['file_bytes'] / 2**20:.0f} MiB", flush=True)
    return folder, json.loads((folder / _DONE).read_text())


def log_of(shape: str, name: str) -> Path:
    """Where a worker's own words go."""
    return _log(shape, f"{name}.serve")


def _log(shape: str, name: str) -> Path:
    path = BUILT / shape / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def _run(command: list[str], log: Path) -> int:
    """Runs a builder offline; returns its peak resident bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}"}
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BuildError(f"its builder failed ({log}): {log_end(log)}")
    return usage.ru_maxrss * 1024


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
