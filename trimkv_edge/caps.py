"""``caps.json``: what ``trimkv-calibrate`` found, and what a shared budget needs to become static. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.files import replace_text

SCHEMA_VERSION = 1
CAPS_FILE = "caps.json"
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Occupancy:
    """Entries that each head kept after events of the exact policy: ``[layers][kv_heads]``."""

    __pydantic_config__ = _STRICT
    mean: list[list[float]]
    p95: list[list[int]]
    max: list[list[int]]


@dataclass(frozen=True)
class TradePoint:
    """One choice of caps: how they were made, the sum of all caps, bytes of the static cache, and agreement with the
    exact policy on held-out text (share of survivors, mean over events)."""

    __pydantic_config__ = _STRICT
    level: str
    entries: int
    bytes: int
    agreement: float


@dataclass(frozen=True)
class Calibration:
    """Caps and how they came about.

    Attributes:
        cache: the settings they were made for, ``caps`` among them.
        model, weights_sha256, gates_sha256: what was calibrated; hashes are empty for random weights and gates.
        dtype: of the cache whose bytes were counted.
        text: where the calibration text is from; tokens, held_out_tokens: how much was read.
        target: agreement that was asked for; agreement: what the caps reach.
        occupancy, trade: what was seen.
    """

    __pydantic_config__ = _STRICT
    schema_version: int
    model: str
    weights_sha256: str
    gates_sha256: str
    cache: CacheConfig
    dtype: str
    text: str
    tokens: int
    held_out_tokens: int
    target: float
    agreement: float
    occupancy: Occupancy
    trade: list[TradePoint]

    def save(self, path: Path) -> None:
        """Writes the file atomically."""
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")


_ADAPTER = TypeAdapter(Calibration)


def load_calibration(path: Path) -> Calibration:
    """Reads and checks ``caps.json``.

    Raises:
        ConfigError: missing, damaged, of another version, or without caps.
    """
    remedy = "make it with trimkv-calibrate"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"caps file {path} does not exist: {remedy}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"caps file {path} cannot be read as JSON ({error}): {remedy}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"caps file {path} has schema version {version!r}, not {SCHEMA_VERSION}: {remedy}")
    try:
        found = _ADAPTER.validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"caps file {path} is not valid at {where!r}: {first['msg']}: {remedy}") from error
    except TrimKVError as error:
        raise ConfigError(f"caps file {path} is not valid: {error}") from error
    if found.cache.caps is None:
        raise ConfigError(f"caps file {path} holds no caps: {remedy}")
    return found
