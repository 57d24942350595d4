"""What is compared: a policy, with the gates that it uses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.eviction import policy_of
from trimkv_edge.policies import POLICIES
from trimkv_edge.policies.base import LOG_BETA

_OPTIONS = ("min_per_head", "threshold")


@dataclass(frozen=True)
class Method:
    """``policy[:gates][:min-per-head=N|SHARE][:threshold=ALPHA]``, such as ``trimkv:rg10`` or
    ``global:rg10:min-per-head=25%``.

    Attributes:
        policy, gates: gates None are the model's own.
        min_per_head: as given, entries or a share of the budget; empty for none.
        threshold: as given; empty for none.

    Raises:
        ConfigError: unknown policy, or options that it cannot honour.
    """

    policy: str
    gates: str | None = None
    min_per_head: str = ""
    threshold: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is not known; use one of {', '.join(POLICIES)}")
        self.config(1024, 256, 1)  # what is wrong with an option is said before anything runs

    @classmethod
    def parse(cls, text: str) -> Method:
        policy, *rest = text.split(":")
        options: dict[str, str] = {}
        while rest and (named := re.fullmatch(r"(min-per-head|threshold)=(.+)", rest[-1])):
            options[named[1].replace("-", "_")] = named[2]
            rest.pop()
        return cls(policy, ":".join(rest) or None, **options)

    @property
    def label(self) -> str:
        options = [f"{name.replace('_', '-')}={getattr(self, name)}" for name in _OPTIONS if getattr(self, name)]
        return ":".join([self.policy, *([self.gates] if self.gates else []), *options])

    def config(self, length: int, budget: int, buffer: int, lookahead: int = 1) -> CacheConfig:
        """Cache settings for streams of ``length`` tokens; the full cache holds them all."""
        policy = POLICIES[self.policy]
        if self.policy == "full":
            config = CacheConfig(length, buffer, min(buffer, length), policy="full")
        else:
            config = CacheConfig(
                budget,
                buffer,
                min(buffer, budget, 128),
                policy=self.policy,
                sinks=min(policy.sinks, budget),
                lookahead=lookahead if LOG_BETA in policy.reads else 1,
            )
        floor = parse_share(self.min_per_head) if self.min_per_head else 0
        floor = floor if isinstance(floor, int) else round(floor * budget)
        config = replace(config, min_per_head=floor, threshold=_number(self.threshold))
        policy_of(config)
        return config


def _number(text: str) -> float:
    try:
        return float(text or 0)
    except ValueError as error:
        raise ConfigError(f"threshold {text!r} is not a number: give a retention below 1") from error


def parse_share(text: str) -> float | int:
    """``25%`` (of the stream's length) as a float, ``64`` (entries per head) as an int.

    Raises:
        ConfigError: neither, or out of range.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return share
        elif int(text) > 0:
            return int(text)
    except ValueError:
        pass
    raise ConfigError(f"budget {text!r}: give entries per KV head (64) or a share of the stream's length (12.5%)")


def entries(budget: float | int, length: int) -> int:
    """Entries per head, a share rounded up to a multiple of 8."""
    return budget if isinstance(budget, int) else 8 * math.ceil(budget * length / 8)
