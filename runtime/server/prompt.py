"""What a request asks for, and what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.constraint import Constraint
from trimkv_edge.runtime.sampling import SamplingParams
from trimkv_edge.runtime.server.pictures import Gallery
from trimkv_edge.runtime.server.requests import Message
from trimkv_edge.runtime.server.scores import TokenScore


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: the messages of a chat, or a text that goes on.

    Attributes:
        logprobs: how many of the most likely tokens to name with each token; None: no probabilities at all.
        constraint: what the answer has to follow; used up by it.
        gallery: the messages' pictures.

    Raises:
        ConfigError: both, or neither.
    """

    sampling: SamplingParams
    max_tokens: int
    stops: Sequence[str] = ()
    messages: Sequence[Message] = ()
    text: str | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    gallery: Gallery = field(default_factory=Gallery)

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ConfigError("a prompt is either messages or a text: give one of them")

    @cached_property
    def earlier(self) -> str | None:
        """Digest of all messages but the newest; None for a text."""
        return self.gallery.digest(self.messages[:-1]) if self.messages else None


class Part(NamedTuple):
    """Text that became final with a token; the token's score if it was asked for."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass
class Answer:
    """What a request was given; grows while it is made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    parts: list[Part] = field(default_factory=list)
    finish: str = "length"

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)
