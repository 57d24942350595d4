"""What a session measured, and the memory of this process."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from trimkv_edge.budget import ModelShape, cache_bytes, format_bytes
from trimkv_edge.engine import Engine


@dataclass(frozen=True)
class SessionStatistics:
    """A snapshot.

    Attributes:
        prompt_tokens: tokens given to ``feed`` since the last reset or load.
        new_tokens: tokens generated since then.
        position: tokens that the engine has read, the next token's position.
        ttft_s: seconds from the start of the last ``feed`` to the first new token after it, without the time the caller
            took in between; None before there was one.
        prefill_tokens_per_s, decode_tokens_per_s: over all steps of the kind, events included; None before the first.
        events: eviction events; event_s: seconds in them.
        live_entries: entries that each KV head holds now, on average where heads share a budget.
        max_entries: entries it can hold (budget + buffer), likewise.
        cache_bytes: size of the cache, whatever the stream's length.
        checkpoint_bytes: what checkpoints hold now; 0 if none was made.
        rss_bytes, peak_rss_bytes: resident memory of this process now and at most.
    """

    prompt_tokens: int
    new_tokens: int
    position: int
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    events: int
    event_s: float
    live_entries: int
    max_entries: int
    cache_bytes: int
    checkpoint_bytes: int
    rss_bytes: int
    peak_rss_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        prefill, decode = _rate(self.prefill_tokens_per_s), _rate(self.decode_tokens_per_s)
        first = "-" if self.ttft_s is None else f"{self.ttft_s:.3f} s"
        return [
            f"prompt    {self.prompt_tokens} tokens, {prefill}",
            f"new       {self.new_tokens} tokens, {decode}, first after {first}",
            f"evictions {self.events} events, {self.event_s:.3f} s",
            f"cache     {format_bytes(self.cache_bytes)}, {self.live_entries} of {self.max_entries} entries per head",
            f"memory    {format_bytes(self.rss_bytes)} now, {format_bytes(self.peak_rss_bytes)} peak",
        ]


def _rate(tokens_per_s: float | None) -> str:
    return "- tokens/s" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def rss_bytes() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Most resident bytes this process ever had."""
    now = psutil.Process().memory_info()
    return max(int(now.rss), _high_water_mark() or int(getattr(now, "peak_wset", 0)))


def _high_water_mark() -> int:
    """0 where the system does not say."""
    try:
        # On Linux getrusage also counts the parent's memory at the time it started this process.
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def float32_cache(engine: Engine) -> int:
    """Bytes of an engine's cache, if it holds float32."""
    # Only the cache's own dimensions count here.
    shape = ModelShape(engine.num_layers, 0, 0, 0, engine.num_kv_heads, engine.head_dim, engine.vocab_size, 0)
    return cache_bytes(shape, engine.config, "float32")


def per_second(count: int, seconds: float) -> float | None:
    """None if no time was spent."""
    return count / seconds if seconds else None
