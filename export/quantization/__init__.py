"""Quantisation schemes: one line each."""

from __future__ import annotations

from collections.abc import Sequence

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.quantization import da8w4, int4, int8, none
from trimkv_edge.export.quantization.base import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        none.SCHEME,
        int8.SCHEME,
        int4.SCHEME,
        da8w4.SCHEME,
    )
}


def find_scheme(name: str, targets: Sequence[str]) -> Scheme:
    """The scheme called ``name``.

    Raises:
        ConfigError: unknown, or one of the targets cannot build it.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise ConfigError(f"quantisation {name!r} is not known; use one of {', '.join(SCHEMES)}")
    for target in targets:
        if target not in scheme.targets:
            able = ", ".join(other.name for other in SCHEMES.values() if target in other.targets)
            raise ConfigError(
                f"{target} cannot run {name} weights: use one of {able} or --target {' '.join(scheme.targets)}"
            )
    return scheme
