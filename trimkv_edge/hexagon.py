"""What a host has to know about graphs compiled for Qualcomm's HTP: ``hexagon.json``. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from trimkv_edge.errors import ConfigError
from trimkv_edge.files import replace_text
from trimkv_edge.host_border import Encoding
from trimkv_edge.host_json import check_format, read_json

FORMAT = 1


@dataclass(frozen=True)
class Soc:
    """A chip as Qualcomm's compiler counts them: its number and the generation of its HTP (73: v73)."""

    model: int
    arch: int


SOCS = {"sm8550": Soc(43, 73), "sm8650": Soc(57, 75), "sm8750": Soc(69, 79)}
DEFAULT_SOC = "sm8750"


def find_soc(name: str) -> Soc:
    """Raises :class:`ConfigError` for one that is not in :data:`SOCS`."""
    if name not in SOCS:
        raise ConfigError(f"SoC {name!r} is not known: use one of {', '.join(SOCS)}")
    return SOCS[name]


def check_shards(shards: int, layers: int) -> None:
    """Raises :class:`ConfigError` unless a graph of so many layers can be cut into so many parts."""
    if not 1 <= shards <= layers:
        raise ConfigError(f"--shards is {shards}, but {layers} layers can be cut into 1 to {layers} parts")


def shard_role(graph: str, part: int) -> str:
    """Role among an artefact's files of one part of a graph that is cut; the first has the graph's name."""
    return f"{graph}_{part + 1}" if part else graph


@dataclass(frozen=True)
class HexagonInfo:
    """How the graphs were compiled.

    Attributes:
        format: version of this file.
        precision: ``fp16``, ``a16w8``, ``a8w8`` or ``a16w4``.
        soc: a key of :data:`SOCS`.
        qairt: version of Qualcomm's compiler.
        encodings: of inputs and outputs by name, alike in all graphs; empty: they are float32.

    Raises:
        ConfigError: a chip that is not known.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    format: int
    precision: str
    soc: str
    qairt: str
    encodings: dict[str, Encoding]

    def __post_init__(self) -> None:
        if self.format == FORMAT:
            find_soc(self.soc)

    def save(self, path: Path) -> None:
        """As JSON; every scale comes back as it was."""
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")


_ADAPTER = TypeAdapter(HexagonInfo)


def load_info(path: Path) -> HexagonInfo:
    """Reads what :meth:`HexagonInfo.save` wrote.

    Raises:
        ArtefactError: the file cannot be read, has another format, or names a chip that is not known.
    """
    info = read_json(path, _ADAPTER)
    check_format(path, info.format, FORMAT)
    return info
