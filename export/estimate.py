"""What an export costs, before anything is built. The constants are measured (``benchmarks/export_cost.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from trimkv_edge.budget import ModelShape, held_as_float32
from trimkv_edge.config import CacheConfig
from trimkv_edge.export.check_artefact import is_large
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.verify import MIN_EVENTS

_FLOAT = 4
# torch, transformers, the exporter and the engine, with a graph of a few hundred nodes.
_LIBRARIES = 900 * 2**20
# A matrix while it is packed: as read, as float32, transposed, padded and packed.
_PACKING = 2.2
# Seconds on a core that adds up to a million in _REFERENCE_LOOP seconds: imports and small graphs, and by layer.
_REFERENCE_LOOP = 0.045
_START = {"onnx": 25.0, "executorch": 25.0, "host-evicted": 25.0, "torch": 25.0}
_LAYER = {"onnx": 2.9, "executorch": 17.5, "host-evicted": 5.5, "torch": 1.0}
# Compilers for devices; those of Arm, the slowest.
_COMPILER = (30.0, 20.0)
# Seconds for each million parameters to read, round and write, and to read and round for the reference.
_PACK = 0.037
_ROUND = {"onnx": 0.066, "executorch": 0.02}
_FLOATS = 0.5  # of that where numbers are only made shorter, or stay as they are
# ONNX Runtime multiplies 8-bit weights with float32 activations slowly, as a multiple of torch's time for float32.
_EIGHT_BITS = 6


@dataclass(frozen=True)
class ExportCost:
    """Estimated peak resident bytes, bytes on disk (artefact, and what verification keeps there) and seconds."""

    memory: int
    disk: int
    seconds: float


def estimate(
    shape: ModelShape,
    config: CacheConfig,
    targets: Sequence[str],
    scheme: Scheme,
    *,
    stored: int,
    cache: int,
    largest: int,
    gates: int,
) -> ExportCost:
    """The cost of an export on this machine, whose speed is tried out for a moment.

    Args:
        stored: bytes of the weights in the artefact; cache: bytes of the cache.
        largest: bytes of the largest parameter in float32.
        gates: bytes of the gates in float32, which are in memory all the time.
    """
    large = is_large(shape.parameters, config)
    held = MIN_EVENTS * 2 * config.slots * shape.rows * shape.head_dim * _FLOAT if large else 0
    opened = int(_copies(targets, scheme, stored) * stored)
    memory = _LIBRARIES + gates + _peak(shape, opened, cache, largest, large)
    return ExportCost(memory, stored * len(targets) + held, _seconds(shape, config, targets, scheme))


def _copies(targets: Sequence[str], scheme: Scheme, stored: int) -> float:
    """The weights in an engine, as a multiple of their file."""
    if held_as_float32(scheme.dtype, stored):
        return 3
    if not set(targets) <= {"onnx", "executorch"}:
        return 2  # the mapped file is there too
    # Packed blocks have more than the file, whose pages leave.
    return 1.2 if scheme.weight_bits < 16 else 1


def _peak(shape: ModelShape, opened: int, cache: int, largest: int, large: bool) -> int:
    """The worst stage; stages hold nothing of each other. ``opened``: the weights in an engine, the mapped file too."""
    full = shape.parameters * _FLOAT
    packing = int(_PACKING * largest)
    # The state of one engine is taken over by another one.
    engine = opened + 2 * cache
    if large:
        return max(packing, 3 * full // shape.num_layers + cache, engine)
    return max(packing, full + cache + engine)


def _seconds(shape: ModelShape, config: CacheConfig, targets: Sequence[str], scheme: Scheme) -> float:
    loop, flops = _speed()
    millions = shape.parameters / 1e6
    tokens = config.budget + (MIN_EVENTS + 0.5) * config.buffer
    read = 2 * shape.parameters * tokens / flops
    total = 0.0
    for target in targets:
        numbers = (
            _START.get(target, _COMPILER[0])
            + _LAYER.get(target, _COMPILER[1]) * shape.num_layers
            + millions * (_PACK + _ROUND.get(target, _ROUND["onnx"])) * (_FLOATS if scheme.weight_bits >= 16 else 1)
        )
        runs = 2 if target in scheme.dynamic and target == "onnx" else 1
        # Engines multiply integers of few bits faster than torch multiplies float32.
        engine = 1 if scheme.weight_bits == 32 else 0.75
        slow = _EIGHT_BITS if target == "onnx" and scheme.weight_bits == 8 else 0
        total += numbers * loop / _REFERENCE_LOOP + read * (1 + runs * engine + slow)
    return total


def _speed() -> tuple[float, float]:
    """Seconds of a loop in Python, and floating-point operations per second of torch."""
    started = perf_counter()
    sum(number for number in range(1_000_000))
    loop = perf_counter() - started
    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    torch.mm(left, right)
    started = perf_counter()
    for _ in range(3):
        torch.mm(left, right)
    return loop, 3 * 2 * 512 * 1024 * 1024 / (perf_counter() - started)
