"""What is compared: a policy, with the gates that it uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.policies import POLICIES


@dataclass(frozen=True)
class Method:
    """``policy`` or ``policy:gates``, such as ``trimkv:rg10`` or ``streaming``.

    Raises:
        ConfigError: unknown policy.
    """

    policy: str
    gates: str | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is not known; use one of {', '.join(POLICIES)}")

    @classmethod
    def parse(cls, text: str) -> Method:
        policy, _, gates = text.partition(":")
        return cls(policy, gates or None)

    @property
    def label(self) -> str:
        return f"{self.policy}:{self.gates}" if self.gates else self.policy

    def config(self, length: int, budget: int, buffer: int, lookahead: int = 1) -> CacheConfig:
        """Cache settings for streams of ``length`` tokens; the full cache holds them all."""
        if self.policy == "full":
            return CacheConfig(length, buffer, min(buffer, length), policy="full")
        chunk = min(buffer, budget, 128)
        sinks = min(POLICIES[self.policy].sinks, budget)
        ahead = lookahead if self.policy == "trimkv" else 1
        return CacheConfig(budget, buffer, chunk, policy=self.policy, sinks=sinks, lookahead=ahead)


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
