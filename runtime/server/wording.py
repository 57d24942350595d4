"""How the two endpoints word an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from trimkv_edge.runtime.server.prompt import Answer, Part
from trimkv_edge.runtime.server.scores import TokenScore

Json = dict[str, Any]


def chat_logprobs(scores: Sequence[TokenScore], offset: int = 0) -> Json:
    """OpenAI's ``choice.logprobs`` of a chat."""

    def entry(text: str, logprob: float) -> Json:
        # A token may hold part of a character only, which has no text of its own.
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    content = [
        entry(found.text, found.logprob) | {"top_logprobs": [entry(*other) for other in found.top]} for found in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(scores: Sequence[TokenScore], offset: int = 0) -> Json:
    """OpenAI's ``choice.logprobs`` of a completion; ``offset``: characters before the first token."""
    starts = []
    for found in scores:
        starts.append(offset)
        offset += len(found.text)
    return {
        "tokens": [found.text for found in scores],
        "token_logprobs": [found.logprob for found in scores],
        "top_logprobs": [dict(found.top) for found in scores],
        "text_offset": starts,
    }


@dataclass(frozen=True)
class Wording:
    """One answer's words.

    Attributes:
        chat: as a chat, or else as a completion.
        model: its name.
        created: seconds since 1970.
        scored: token probabilities were asked for.
    """

    chat: bool
    model: str
    created: int
    scored: bool

    def whole(self, answer: Answer) -> Json:
        """The body of an answer that is not streamed."""
        text = answer.text
        said: Json = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        scores = [found for part in answer.parts for found in part.scores]
        choice = {"index": 0, **said, "logprobs": self._logprobs(scores, 0), "finish_reason": answer.finish}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage_of(answer)}

    def stream(self) -> Stream:
        """The words of a streamed answer."""
        return Stream(self, self._head("chat.completion.chunk"))

    def _head(self, kind: str) -> Json:
        name, kind = ("chatcmpl-", kind) if self.chat else ("cmpl-", "text_completion")
        return {"id": name + uuid4().hex, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, scores: Sequence[TokenScore], offset: int) -> Json | None:
        if not self.scored:
            return None
        return (chat_logprobs if self.chat else text_logprobs)(scores, offset)


class Stream:
    """Server-sent events of one answer.

    Args:
        wording: of the answer.
        head: what all its chunks begin with.
    """

    def __init__(self, wording: Wording, head: Json) -> None:
        self._wording, self._head = wording, head
        self._offset = 0

    def opening(self) -> str:
        """Comes first; empty for completions."""
        return self._event({"delta": {"role": "assistant", "content": ""}}) if self._wording.chat else ""

    def part(self, part: Part) -> str:
        """A part's event; empty if it has nothing to say."""
        if not part.text and not part.scores:
            return ""
        said: Json = {"delta": {"content": part.text}} if self._wording.chat else {"text": part.text}
        logprobs = self._wording._logprobs(part.scores, self._offset) if part.scores else None
        self._offset += sum(len(found.text) for found in part.scores)
        return self._event(said, logprobs)

    def closing(self, answer: Answer, usage: bool) -> str:
        """How it ended, what it cost if ``usage``, and the mark of the end."""
        said: Json = {"delta": {}} if self._wording.chat else {"text": ""}
        end = self._event(said, None, answer.finish)
        if usage:
            end += event(self._head | {"choices": [], "usage": usage_of(answer)})
        return end + "data: [DONE]\n\n"

    def _event(self, said: Json, logprobs: Json | None = None, finish: str | None = None) -> str:
        return event(self._head | {"choices": [{"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}]})


def usage_of(answer: Answer) -> Json:
    """Tokens, and how many of the prompt's the cache held already."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
