"""Settings of the bounded cache, shared by the eager reference, the exporters and the runtime. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_edge.errors import BudgetError, ConfigError

# RoPE angles are computed in float32 and a float32 holds every integer only up to here.
POSITION_LIMIT = 2**24
KV_DTYPES = ("float32", "float16", "bfloat16", "int8")
_GATE_ROWS = 128


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
        min_per_head: entries that no head goes below while others have more; for budgets that heads share.
        threshold: retention below which an entry leaves even if there is room, 0 for none; for budgets that heads
            share.
        caps: most entries that each KV head keeps, per layer, for budgets that heads share: what makes their shapes
            static. None outside exported graphs.
        kv_dtype: how keys and values are stored: ``float32``, ``float16``, ``bfloat16``, or ``int8`` with a scale for
            each channel.

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
    min_per_head: int = 0
    threshold: float = 0.0
    caps: tuple[tuple[int, ...], ...] | None = None
    kv_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (
            ("budget", 1),
            ("buffer", 1),
            ("prefill_chunk", 1),
            ("sinks", 0),
            ("recent", 0),
            ("lookahead", 1),
            ("min_per_head", 0),
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
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold}, but a retention lies in [0, 1): 0 switches it off")
        if self.min_per_head > self.budget:
            raise BudgetError(
                f"min per head {self.min_per_head} needs more entries than the budget of {self.budget} per head holds: "
                "lower --min-per-head or raise --budget"
            )
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"KV dtype {self.kv_dtype!r} is not known: use one of {', '.join(KV_DTYPES)}")
        if self.caps is not None:
            self._check_caps(self.caps)

    def _check_caps(self, caps: tuple[tuple[int, ...], ...]) -> None:
        if not caps or not caps[0] or any(len(heads) != len(caps[0]) for heads in caps):
            raise ConfigError("caps must give one number for each KV head of each layer")
        low = max(self.min_per_head, self.sinks + self.recent, 1)
        every = [cap for heads in caps for cap in heads]
        if min(every) < low:
            raise BudgetError(
                f"a cap of {min(every)} entries is below the {low} that each head must be able to keep: "
                "raise it, or lower --min-per-head, --sinks or --recent"
            )
        if sum(every) < self.budget * len(every):
            raise BudgetError(
                f"caps hold {sum(every)} entries, fewer than a budget of {self.budget} for each of {len(every)} heads: "
                "calibrate them for this budget"
            )

    @property
    def slots(self) -> int:
        """Slots C = M + B of each head."""
        return self.budget + self.buffer

    @property
    def gate_rows(self) -> int:
        """Tokens that gates read together where they need not read each at once: a prefill chunk, or many enough that
        their weights are no longer what a token costs."""
        return max(self.prefill_chunk, min(self.buffer, _GATE_ROWS))

    def segment(self, first: bool) -> int:
        """Tokens up to the next event of a budget that heads share; after the first they fall on M + B, M + 2B, ..."""
        return (self.budget % self.buffer or self.buffer) if first else self.buffer
