"""The output folder of a training: what it was started with, and checkpoints that are complete or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trimkv_edge.errors import ConfigError
from trimkv_edge.files import replace_durably, sync

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
# Everything that a training writes; --force removes these and nothing else.
WRITTEN = (RUN_FILE, CHECKPOINTS, LOGS, "gates.safetensors", "gates.json", "README.md")
_PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint-(\d+)$")


def complete(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder gets its name when all of it is on disk."""
    found = [(int(match[1]), path) for path in (output / CHECKPOINTS).glob("*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def staging(output: Path) -> Path:
    """Where a checkpoint is put together."""
    return output / CHECKPOINTS / _PARTIAL


def clear_staging(output: Path) -> None:
    """An empty staging folder; what a killed run left there goes."""
    shutil.rmtree(staging(output), ignore_errors=True)
    staging(output).mkdir(parents=True)


def publish(output: Path, name: str, keep: int) -> None:
    """Gives a staged checkpoint its name, then drops all but the newest `keep`."""
    made, target = staging(output) / name, output / CHECKPOINTS / name
    for path in [*made.rglob("*"), made]:
        sync(path)
    if target.exists():  # a resumed run came by here again
        os.rename(target, staging(output) / f"old-{name}")
    os.rename(made, target)
    sync(target.parent)
    for path in complete(output)[:-keep]:
        os.rename(path, staging(output) / path.name)
    shutil.rmtree(staging(output), ignore_errors=True)


def check_output(output: Path, resume: bool, force: bool, settings: dict[str, Any]) -> Path | None:
    """What a run may do in its output folder; changes nothing.

    Args:
        output: the folder.
        resume: go on from the newest complete checkpoint, if there is one.
        force: start over.
        settings: what must be equal for a run to go on: see `TrainConfig.fixed`, data and base hashes.

    Returns:
        The checkpoint to go on from; None to start at step 0.

    Raises:
        ConfigError: the folder is in use, or its run had other settings.
    """
    if resume and force:
        raise ConfigError("--resume goes on and --force starts over: give one of them")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file: give a folder")
    recorded = _read(output / RUN_FILE)
    if recorded is None:
        others = sorted(path.name for path in output.glob("*")) if output.is_dir() else []
        if others:
            raise ConfigError(f"output {output} holds {others[0]} but no training: give a new or empty folder")
        return None
    if force:
        return None
    if not resume:
        raise ConfigError(f"output {output} holds a training: --resume goes on with it, --force starts over")
    for name in sorted({*recorded, *settings}):
        if recorded.get(name) != settings.get(name):
            raise ConfigError(
                f"cannot resume {output}: {name.replace('_', ' ')} was {recorded.get(name)} and is now "
                f"{settings.get(name)}; resume with the same settings, data and model, or start over with --force"
            )
    found = complete(output)
    return found[-1] if found else None


def prepare_output(output: Path, checkpoint: Path | None, settings: dict[str, Any]) -> None:
    """Makes the folder ready: an empty run with its settings, or the run to go on with as it is."""
    if checkpoint is None:
        for name in WRITTEN[1:]:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    replace_durably(output / RUN_FILE, lambda beside: beside.write_text(text, encoding="utf-8"))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): start over with --force in another folder") from error
    return found if isinstance(found, dict) else {}
