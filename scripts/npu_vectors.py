"""Writes ``docs/npu/vectors.json``: inputs and results that a host in another language checks itself against.

python scripts/npu_vectors.py            # docs/npu.md says what is in it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_edge.config import CacheConfig
from trimkv_edge.files import replace_text
from trimkv_edge.host_cache import HostCache, Rotary
from trimkv_edge.host_eviction import HostEntries, log_sigmoid, score

FORMAT = 1
OUTPUT = Path(__file__).parent.parent / "docs" / "npu" / "vectors.json"
# Multiples of 1/128 are exact in JSON, float32 and, in this range, nearly so in float16.
_STEP = 128
_LOGITS = [-104.0, -20.5, -3.0, -0.5, 0.0, 0.5, 3.0, 8.0, 12.25, 15.0, 16.640625, 17.0, 17.5, 20.0, 40.0, 80.0, 120.0]
_PLAIN = [1.0, 0.1, 0.01, 0.001]
_LLAMA = [1.0, 0.19388250861317, 0.0375904319435358, 0.0072881401516497]
# name, settings, layers, KV heads, tokens, smallest and largest gate logit; equal ones tie.
_STREAMS: list[tuple[str, CacheConfig, int, int, int, float, float]] = [
    ("plain", CacheConfig(8, 4, 4), 2, 2, 61, -1.0, 9.0),
    ("sinks and recent", CacheConfig(9, 5, 3, sinks=2, recent=3), 1, 3, 66, 0.0, 6.0),
    ("an event for each token", CacheConfig(5, 1, 1), 1, 2, 24, -1.0, 5.0),
    ("betas near one", CacheConfig(8, 8, 8), 1, 4, 70, 14.0, 19.0),
    ("ties", CacheConfig(6, 6, 4), 2, 1, 50, 120.0, 120.0),
    ("streaming", CacheConfig(6, 4, 4, policy="streaming", sinks=2), 1, 2, 30, 0.0, 4.0),
    ("random", CacheConfig(6, 4, 4, policy="random"), 2, 2, 40, 0.0, 4.0),
]


def vectors() -> dict[str, Any]:
    """What the file holds."""
    return {
        "format": FORMAT,
        "log_sigmoid": {"logit": _LOGITS, "log_beta": _floats(log_sigmoid(_LOGITS))},
        "scores": _scores(),
        "rotary": [_rotary(_PLAIN, 1.0), _rotary(_LLAMA, 1.190238118171692)],
        "masks": [_mask(*case) for case in ((0, 1, 1), (0, 3, 4), (5, 1, 1), (5, 4, 4), (9, 2, 4), (11, 1, 4))],
        "streams": [_stream(seed, *case) for seed, case in enumerate(_STREAMS)],
    }


def _scores() -> list[dict[str, Any]]:
    found = []
    for log_beta in (-0.6931471824645996, -3.3535465e-4, -4.1399375e-08, -0.0):
        for position, seen in ((0, 1), (7, 12), (100, 2049), (3, 2**24 - 1), (2**24 - 2, 2**24 - 1)):
            rounded = np.full((1, 1, 1), log_beta, np.float32)
            entries = HostEntries(rounded, np.full((1, 1, 1), position), rounded[..., None], seen)
            result = score(entries, CacheConfig(1, 1, 1))
            found.append(
                {
                    "log_beta": float(rounded[0, 0, 0]),
                    "position": position,
                    "seen": seen,
                    "score": float(result[0, 0, 0]),
                }
            )
    return found


def _rotary(frequencies: list[float], scaling: float) -> dict[str, Any]:
    rotary = Rotary(np.array(frequencies, np.float32), scaling)
    positions = [0, 1, 2047, 2049, 100_003, 2**23 + 1, 2**24 - 1]
    cos, sin = rotary.rows(np.array(positions))
    return {
        "inverse_frequencies": _floats(rotary.inverse_frequencies),
        "attention_scaling": scaling,
        "positions": positions,
        "cos": [_floats(row) for row in cos[0]],
        "sin": [_floats(row) for row in sin[0]],
    }


def _mask(live: int, count: int, chunk: int) -> dict[str, Any]:
    cache = HostCache(CacheConfig(8, 4, 4), 1, 1, 2)
    rows = np.zeros((1, 1, 1, 2), np.float32)
    for _ in range(live):
        cache.append(rows, rows, None, 1)
    mask = cache.mask(count, chunk)[0, 0]
    return {
        "slots": cache.config.slots,
        "live": live,
        "count": count,
        "chunk": chunk,
        "visible": [np.flatnonzero(row == 0).tolist() for row in mask],
    }


def _stream(
    seed: int, name: str, config: CacheConfig, layers: int, heads: int, tokens: int, low: float, high: float
) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    logits = random.integers(round(low * _STEP), round(high * _STEP) + 1, (tokens, layers, heads)) / _STEP
    cache = HostCache(config, layers, heads, 1)
    events, chunks = [], []
    while cache.seen < tokens:
        count = int(min(random.integers(1, config.prefill_chunk + 1), cache.room, tokens - cache.seen))
        chunks.append(count)
        new = slice(cache.seen, cache.seen + count)
        rows = np.zeros((layers, heads, count, 1), np.float32)
        cache.append(rows, rows, logits[new].transpose(1, 0, 2).astype(np.float32), count)
        if cache.room == 0:
            moved = cache.evict()
            events.append(
                {"seen": cache.seen, "moved": moved, "positions": cache.positions[..., : cache.live].tolist()}
            )
    return {
        "name": name,
        "policy": config.policy,
        "budget": config.budget,
        "buffer": config.buffer,
        "sinks": config.sinks,
        "recent": config.recent,
        "layers": layers,
        "kv_heads": heads,
        "chunks": chunks,
        "gate_logits": logits.tolist(),
        "events": events,
        "end": cache.positions[..., : cache.live].tolist(),
    }


def _floats(numbers: Any) -> list[float]:
    return [float(number) for number in np.asarray(numbers, np.float32).ravel()]


def text() -> str:
    """The file: one line for each case."""
    parts = []
    for name, value in vectors().items():
        body = json.dumps(value)
        if isinstance(value, list):
            body = "[\n  " + ",\n  ".join(json.dumps(case) for case in value) + "\n ]"
        parts.append(f' "{name}": {body}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    replace_text(parser.parse_args().output, text())


if __name__ == "__main__":
    main()
