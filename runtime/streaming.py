"""Tokens -> text while they arrive: whole characters only, and stop strings across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trimkv_edge.errors import ConfigError

_REPLACEMENT = "\ufffd"
_LONGEST = 4  # bytes, so also tokens, of a UTF-8 character
_WINDOW = 32


class TextDecoder(Protocol):
    """What streaming needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Gives the text of a token stream piece by piece.

    It decodes a short window that starts at a place where the text was whole, and gives what is new in it, so that
    decoders which look at neighbours (leading spaces, byte fallback) see them. ``tokenizers.DecodeStream`` works alike,
    but has no flush: the text behind bytes that never become a character would be lost at the end, and its window grows
    without bound while a model emits such bytes.

    Args:
        decoder: the tokenizer.
        context: newest tokens of the stream so far; a decoder that strips a text's first space then keeps it.
    """

    def __init__(self, decoder: TextDecoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._ids = list(context)
        self._shown = decoder.decode(self._ids) if self._ids else ""
        if self._shown.endswith(_REPLACEMENT):
            self._ids, self._shown = [], ""
        # Tokens from here on may belong to a character that is not whole yet.
        self._fresh = len(self._ids)
        self._length = len(self._shown)  # of the window's whole text

    def push(self, token: int) -> str:
        """Text that became final with ``token``; may be empty."""
        self._ids.append(token)
        text = self._decoder.decode(self._ids)
        # Byte fallback gives one replacement per byte, so text that shrinks ends in a real, whole U+FFFD.
        unfinished = text.endswith(_REPLACEMENT) and len(text) >= self._length
        self._length = len(text)
        if unfinished and len(self._ids) - self._fresh < _LONGEST:
            return ""
        if not text.startswith(self._shown):
            # Byte fallback turns a whole run of bytes into replacements when one of them is wrong.
            text = self._forget(self._fresh)
            self._shown = ""
        # After so many tokens, only the last replacement can still become a character.
        end = len(text) - unfinished
        piece, self._shown = text[len(self._shown) : end], text[:end]
        if not unfinished and piece:
            self._shown = self._forget(self._fresh)
        elif len(self._ids) > _WINDOW:
            text = self._forget(len(self._ids) - _WINDOW // 2)
            self._shown = text[: len(text) - unfinished]
        if not unfinished:
            self._fresh = len(self._ids)
        return piece

    def flush(self) -> str:
        """The rest at the end of the stream; bytes that never became a character are U+FFFD. Starts afresh."""
        text = self._decoder.decode(self._ids)
        if not text.startswith(self._shown):
            text, self._shown = self._forget(self._fresh), ""
        rest = text[len(self._shown) :]
        self._ids, self._shown, self._fresh, self._length = [], "", 0, 0
        return rest

    def _forget(self, count: int) -> str:
        """Drops the window's first tokens; returns the text of the others."""
        del self._ids[:count]
        self._fresh = max(0, self._fresh - count)
        text = self._decoder.decode(self._ids)
        self._length = len(text)
        return text


class StopStrings:
    """Cuts a text stream at the first stop string that is complete; holds back what may be the beginning of one.

    Of two that end at the same character the longer one counts, so the result does not depend on how the text is split.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ConfigError("a stop string is empty: give at least one character")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string; sets ``stopped`` and gives nothing more after one."""
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


class TextStream:
    """Tokens -> text with stop strings.

    Args:
        decoder: the tokenizer; None gives empty text.
        stops: stop strings.
        context: newest tokens of the stream so far.

    Raises:
        ConfigError: an empty stop string, or stop strings without a tokenizer.
    """

    def __init__(self, decoder: TextDecoder | None, stops: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        if stops and decoder is None:
            raise ConfigError("stop strings need a tokenizer, and there is none: use stop ids")
        self._text = None if decoder is None else Detokenizer(decoder, context)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Text that became final with ``token``."""
        return "" if self._text is None else self._stops.push(self._text.push(token))

    def flush(self) -> str:
        """The rest; empty after a stop string."""
        if self._text is None:
            return ""
        return self._stops.push(self._text.flush()) + self._stops.flush()
