"""From a conversation to a stream of exactly so many tokens, with the places of its answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.evaluation.conversation import ANSWER_CLOSE, ANSWER_OPEN, FILLER, Conversation
from trimkv_edge.runtime.chat import TEMPLATE_FILE, render_chat
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE


@dataclass(frozen=True)
class Answer:
    """Tokens ``[start, end)`` of a stream that have to be produced."""

    start: int
    end: int
    group: str = ""


@dataclass(frozen=True)
class Sample:
    """One stream.

    Attributes:
        ids: token ids.
        answers: what is asked for, in order; for plain text every token but the first.
        text_bytes: UTF-8 bytes of the predicted text, 0 where no bits per byte are wanted.
    """

    ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    text_bytes: int = 0


@dataclass(frozen=True)
class WordList:
    """Words that tasks take facts from; in chat models' vocabularies most are one token with their space."""

    keys: Sequence[str]
    values: Sequence[str]


class SampleWriter:
    """Turns what tasks write into token ids of one model.

    Args:
        folder: holds ``tokenizer.json`` and, for chat form, ``chat_template.jinja``.
        words: word list.
        texts: filler, at least one non-empty text.
        special: ``bos_token`` and ``eos_token``, for templates and for models without one.

    Raises:
        ModelError: no tokenizer in the folder.
        ConfigError: no filler text.
    """

    def __init__(
        self, folder: Path, words: WordList, texts: Sequence[str], special: Mapping[str, str] | None = None
    ) -> None:
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ModelError(f"{folder} holds no {TOKENIZER_FILE}, so nothing can be asked in words")
        self.tokenizer = Tokenizer.from_file(str(path))
        template = folder / TEMPLATE_FILE
        self._template = template.read_text(encoding="utf-8") if template.is_file() else None
        self._special = dict(special or {})
        self.words = words
        self._filler = [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False) if e.ids]
        if not self._filler:
            raise ConfigError("the filler text is empty: give --text a file with some text")

    def set_special(self, ids: Mapping[str, int]) -> None:
        """Names special tokens (``bos_token``, ``eos_token``) by their ids."""
        self._special = {name: self.tokenizer.id_to_token(token) or "" for name, token in ids.items()}

    def filler(self, rng: random.Random, count: int) -> list[int]:
        """``count`` tokens from a random place of the filler texts."""
        out: list[int] = []
        while len(out) < count:
            ids = self._filler[rng.randrange(len(self._filler))]
            start = 0 if out else rng.randrange(len(ids))
            out += ids[start : start + count - len(out)]
        return out

    def conversation(self, rng: random.Random, conversation: Conversation, length: int) -> Sample:
        """A stream of exactly ``length`` tokens; filler shares what the conversation leaves free.

        Raises:
            ConfigError: the conversation alone is longer.
        """
        parts = [self._encode(part) for part in self._render(conversation).split(FILLER)]
        taken = sum(len(ids) for ids, _ in parts)
        gaps = len(parts) - 1
        if taken > length or (not gaps and taken != length):
            raise ConfigError(f"a stream of {length} tokens cannot hold the task, which alone takes {taken}: give more")
        ids: list[int] = []
        answers: list[Answer] = []
        groups = iter(conversation.groups)
        for number, (part, spans) in enumerate(parts):
            answers += [Answer(len(ids) + start, len(ids) + end, next(groups)) for start, end in spans]
            ids += part
            if number < gaps:
                ids += self.filler(rng, (length - taken) * (number + 1) // gaps - (length - taken) * number // gaps)
        return Sample(tuple(ids), tuple(answers))

    def text(self, rng: random.Random, length: int) -> Sample:
        """Plain text: every token after the first is asked for."""
        ids = self.filler(rng, length)
        size = len(self.tokenizer.decode(ids[1:], skip_special_tokens=False).encode())
        return Sample(tuple(ids), tuple(Answer(i, i + 1) for i in range(1, length)), size)

    def _render(self, conversation: Conversation) -> str:
        if self._template is None:
            lines = [f"{role.capitalize()}: {content}\n" for role, content in conversation.messages]
            return self._special.get("bos_token", "") + "".join(lines)
        messages = [{"role": role, "content": content} for role, content in conversation.messages]
        return render_chat(self._template, messages, self._special)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without its marks, and the token span of each marked answer."""
        plain, chars = "", []
        for piece in text.split(ANSWER_OPEN):
            answer, closed, rest = piece.partition(ANSWER_CLOSE)
            if closed:
                chars.append((len(plain), len(plain) + len(answer)))
            plain += answer + rest
        encoding = self.tokenizer.encode(plain, add_special_tokens=False)
        spans = []
        for start, end in chars:
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if b > start and a < end]
            spans.append((inside[0], inside[-1] + 1))
        return encoding.ids, spans
