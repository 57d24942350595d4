"""Settings of the bounded cache, shared by the eager reference, the exporters and the runtime. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_edge.errors import BudgetError, ConfigError

# RoPE angles are computed in float32 and a float32 holds every integer only up to here.
POSITION_LIMIT = 2**24


@dataclass(frozen=True)
class CacheConfig:
    """The bounded cache of one artefact.

    Attributes:
        budget: entries M that each KV head keeps after an eviction event.
        buffer: entries B of the ring buffer; an event runs when a head holds M + B entries.
        prefill_chunk: most tokens per prefill call; at most ``buffer``, so that the bound holds during prefill too.
        policy: name of the eviction policy (see :mod:`trimkv_edge.policies`).
        sinks: first positions of the stream that never leave (0, as published).
        recent: newest positions that never leave (0, as published).
        lookahead: steps of the look-ahead score; 1 is the single-step score.

    Raises:
        ConfigError: a value is out of range.
        BudgetError: the budget cannot hold what it has to.
    """

    budget: int
    buffer: int = 128
    prefill_chunk: int = 128
    policy: str = "trimkv"
    sinks: int = 0
    recent: int = 0
    lookahead: int = 1

    def __post_init__(self) -> None:
        for name, low in (
            ("budget", 1),
            ("buffer", 1),
            ("prefill_chunk", 1),
            ("sinks", 0),
            ("recent", 0),
            ("lookahead", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= {low}")
        if self.prefill_chunk > self.buffer:
            raise ConfigError(
                f"prefill chunk {self.prefill_chunk} is larger than the buffer {self.buffer}: "
                f"lower --prefill-chunk to at most {self.buffer} or raise --buffer"
            )
        if self.budget < self.prefill_chunk:
            raise BudgetError(
                f"a budget of {self.budget} entries per head is smaller than one prefill chunk ({self.prefill_chunk}): "
                f"raise --budget to at least {self.prefill_chunk} or lower --prefill-chunk"
            )
        if self.sinks + self.recent > self.budget:
            raise BudgetError(
                f"sinks ({self.sinks}) + recent ({self.recent}) protect more entries than the budget of {self.budget} "
                "holds: lower them or raise --budget"
            )

    @property
    def slots(self) -> int:
        """Slots C = M + B of each head."""
        return self.budget + self.buffer
