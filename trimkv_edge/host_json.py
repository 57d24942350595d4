"""JSON files beside graphs that a host drives: read whole and checked, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from trimkv_edge.errors import ArtefactError, ConfigError, reason

T = TypeVar("T")


def read_json(path: Path, adapter: TypeAdapter[T]) -> T:
    """What a file holds; raises :class:`ArtefactError` if it cannot be read or is not of that kind."""
    try:
        return adapter.validate_json(path.read_bytes())
    except (OSError, ValidationError, ConfigError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else reason(error)
        raise ArtefactError(f"{path} cannot be read ({why}): copy the whole folder again or export it again") from error


def check_format(path: Path, found: int, known: int) -> None:
    """Raises :class:`ArtefactError` for a file of another version."""
    if found != known:
        raise ArtefactError(
            f"{path} has format {found}, but this trimkv-edge reads format {known}: "
            "install the version that made it, or export again"
        )
