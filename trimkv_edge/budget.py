"""Slots <-> bytes, peak estimates and the fits-check. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError, ConfigError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]?)(I?B)?\s*", re.ASCII)
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED_BYTES = {**DTYPE_BYTES, "int8": 1}  # keys and values
_METADATA_BYTES = 4  # log_beta, float32, per slot and head
_POSITION_BYTES = 8  # int64, per kept slot and head
_HELD = 2 * 2**30


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on. ``parameters`` includes the gates."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int

    @property
    def rows(self) -> int:
        """(layer, KV head) pairs."""
        return self.num_layers * self.num_kv_heads


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a process that runs the model: exact ``cache`` and ``weights``, estimated ``workspace``."""

    cache: int
    weights: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.cache + self.weights + self.workspace


def entry_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes of one slot in every layer and head: key, value and log_beta."""
    return shape.rows * (2 * shape.head_dim * _itemsize(dtype) + _METADATA_BYTES)


def cache_bytes(shape: ModelShape, config: CacheConfig, dtype: str) -> int:
    """Exact bytes of the cache tensors.

    Each head has M + B slots, and int64 positions of the M kept ones. With caps, a head has its cap + B slots for keys
    and values, the tables of log-betas and positions are as wide as the largest cap needs, and the number that each
    head keeps is stored. ``dtype`` is the model's; a cache of float16 or int8 keys and values says so itself.
    """
    if config.kv_dtype != "float32":
        dtype = config.kv_dtype
    if config.caps is None:
        return config.slots * entry_bytes(shape, dtype) + config.budget * shape.rows * _POSITION_BYTES
    every = [cap for heads in config.caps for cap in heads]
    slots = sum(every) + len(every) * config.buffer
    tables = (max(every) + config.buffer) * _METADATA_BYTES + max(every) * _POSITION_BYTES + _POSITION_BYTES
    return slots * 2 * shape.head_dim * _itemsize(dtype) + len(every) * tables


def full_cache_bytes(shape: ModelShape, tokens: int, dtype: str) -> int:
    """Bytes an ordinary KV cache needs after ``tokens`` tokens."""
    return tokens * shape.rows * 2 * shape.head_dim * _itemsize(dtype)


def parse_budget(text: str, shape: ModelShape, buffer: int, dtype: str) -> int:
    """``"512"`` (entries per head) or ``"64MB"``, ``"1.5GiB"`` (bytes of the whole cache, ring included) -> entries M.

    Raises:
        ConfigError: not a number of entries or a size.
        BudgetError: the bytes do not hold the ring and one kept entry.
    """
    match = _SIZE.fullmatch(text.upper())
    if not match or (not match[2] and not match[3] and "." in match[1]):
        raise ConfigError(f"budget {text!r} is neither entries per head (512) nor a size (64MB, 1.5GB)")
    if not match[2] and not match[3]:
        return int(match[1])
    total = int(float(match[1]) * _UNITS[match[2]])
    per_entry = entry_bytes(shape, dtype)
    fixed = buffer * per_entry
    budget = (total - fixed) // (per_entry + shape.rows * _POSITION_BYTES)
    if budget < 1:
        raise BudgetError(
            f"budget {text} does not hold the ring of {buffer} entries ({format_bytes(fixed)}) and one kept entry: "
            "raise --budget or lower --buffer"
        )
    return int(budget)


def parse_size(text: str) -> int | None:
    """Bytes of a budget that is given as a size (``"64MB"``), None for one given in entries per head (``"512"``)."""
    match = _SIZE.fullmatch(text.upper())
    return int(float(match[1]) * _UNITS[match[2]]) if match and (match[2] or match[3]) else None


def check_budget(config: CacheConfig, shape: ModelShape, dtype: str, budget: str) -> None:
    """Raises :class:`BudgetError` if the cache with its caps needs more bytes than a budget given as a size."""
    size, needed = parse_size(budget), cache_bytes(shape, config, dtype)
    if size is not None and needed > size:
        raise BudgetError(
            f"the caps need a cache of {format_bytes(needed)}, more than the budget of {format_bytes(size)}: "
            "calibrate for a smaller budget or raise --budget"
        )


def estimate_memory(shape: ModelShape, config: CacheConfig, dtype: str) -> MemoryEstimate:
    """Memory to run: the workspace counts the widest activations of one prefill chunk, and what gates have yet to read,
    in float32."""
    chunk = config.prefill_chunk
    attention = shape.num_attention_heads * (config.slots + 3 * shape.head_dim)
    mlp = 3 * shape.intermediate_size + 4 * shape.hidden_size
    waiting = config.gate_rows * shape.num_layers * shape.hidden_size
    workspace = 4 * (chunk * (attention + mlp) + shape.vocab_size + waiting)
    return MemoryEstimate(cache_bytes(shape, config, dtype), shape.parameters * _itemsize(dtype), workspace)


def held_as_float32(dtype: str, weights: int) -> bool:
    """Whether ONNX Runtime on a CPU holds 16-bit weights as float32 too, which is faster: if their bytes are few."""
    return dtype in ("float16", "bfloat16") and weights < _HELD


def check_fits(needed: int, what: str, available: int | None = None) -> None:
    """Raises :class:`BudgetError` if ``needed`` bytes are more than the memory available now."""
    limit = psutil.virtual_memory().available if available is None else available
    if needed > limit:
        raise BudgetError(
            f"{what} needs {format_bytes(needed)}, but {format_bytes(limit)} of memory are available: "
            "lower --budget, choose a smaller model, or free memory"
        )


def format_bytes(count: int) -> str:
    """``1536 -> '1.5 KiB'``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _itemsize(dtype: str) -> int:
    if dtype not in _STORED_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(_STORED_BYTES)}")
    return _STORED_BYTES[dtype]
