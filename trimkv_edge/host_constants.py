"""What a host has to know about a host-evicted graph beyond the artefact's manifest: ``host.json``. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from trimkv_edge.files import replace_text
from trimkv_edge.host_cache import Rotary
from trimkv_edge.host_json import check_format, read_json

FORMAT = 1


@dataclass(frozen=True)
class HostConstants:
    """Numbers that graphs do not hold, because the host makes what they are for.

    Attributes:
        format: version of this file.
        masked: what the mask adds to hidden slots.
        inverse_frequencies, attention_scaling: see :class:`~trimkv_edge.host_cache.Rotary`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    format: int
    masked: float
    inverse_frequencies: list[float]
    attention_scaling: float

    @property
    def rotary(self) -> Rotary:
        return Rotary(np.array(self.inverse_frequencies, np.float32), self.attention_scaling)

    def save(self, path: Path) -> None:
        """As JSON; every float32 comes back as it was."""
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")


_ADAPTER = TypeAdapter(HostConstants)


def load_constants(path: Path) -> HostConstants:
    """Reads what :meth:`HostConstants.save` wrote.

    Raises:
        ArtefactError: the file cannot be read, or has another format.
    """
    constants = read_json(path, _ADAPTER)
    check_format(path, constants.format, FORMAT)
    return constants
