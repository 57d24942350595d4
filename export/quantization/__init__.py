"""Quantisation schemes: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimkv_edge.config import KV_DTYPES
from trimkv_edge.errors import ConfigError
from trimkv_edge.export.quantization import bf16, da8w4, fp16, int4, int4_fp16, int8, none
from trimkv_edge.export.quantization.base import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        none.SCHEME,
        fp16.SCHEME,
        bf16.SCHEME,
        int8.SCHEME,
        int4.SCHEME,
        da8w4.SCHEME,
        int4_fp16.SCHEME,
    )
}


def find_scheme(name: str, targets: Sequence[str] = (), embedding_bits: int | None = None) -> Scheme:
    """The scheme called ``name``.

    Args:
        targets: that have to build it.
        embedding_bits: of the token embedding, 4 or 8; None: what the scheme has.

    Raises:
        ConfigError: unknown, one of the targets cannot build it, or its embedding cannot have these bits.
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
    if embedding_bits is None:
        return scheme
    if scheme.embedding_bits > 8:
        able = ", ".join(other.name for other in SCHEMES.values() if other.embedding_bits <= 8)
        raise ConfigError(
            f"--quant {scheme.name} does not round the embedding: leave out --embedding-bits, or use --quant {able}"
        )
    if embedding_bits not in (4, 8):
        raise ConfigError(f"the embedding cannot have {embedding_bits} bits: use --embedding-bits 4 or 8")
    return replace(scheme, embedding_bits=embedding_bits)


def check_kv_dtype(scheme: Scheme, kv_dtype: str) -> None:
    """Raises :class:`ConfigError` if keys and values cannot be stored so beside the scheme's weights."""
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"KV dtype {kv_dtype!r} is not known: use one of {', '.join(KV_DTYPES)}")
    if kv_dtype not in scheme.kv_dtypes:
        able = ", ".join(other.name for other in SCHEMES.values() if kv_dtype in other.kv_dtypes)
        raise ConfigError(
            f"--quant {scheme.name} keeps {' or '.join(scheme.kv_dtypes)} keys and values, not {kv_dtype}: leave out "
            f"--kv-dtype, or use --quant {able}"
        )
