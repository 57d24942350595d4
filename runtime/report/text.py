"""The text of each token of a stream, as a page can show it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from trimkv_edge.runtime.streaming import Detokenizer
from trimkv_edge.runtime.tokenizer import TextTokenizer

# Controls that a browser drops, and those that would turn the order of the text around them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class TokenText(NamedTuple):
    """``text`` that became final with a token; ``special``: it is the token's name, not text of the stream."""

    text: str
    special: bool


def token_texts(tokenizer: TextTokenizer, tokens: Sequence[int]) -> list[TokenText]:
    """One for each token. A character that several tokens make is the text of the last of them; the others have none.
    Characters that cannot be seen are written as their code point, line ends and tabs excepted."""
    decoder = Detokenizer(tokenizer)
    out: list[TokenText] = []
    for token in tokens:
        text = decoder.push(token)
        # What is no text even alone is a special token, which decoding leaves out.
        if not text and not tokenizer.decode([token]):
            out.append(TokenText(tokenizer.token(token) or f"<{token}>", True))
        else:
            out.append(TokenText(visible(text), False))
    rest = decoder.flush()
    if rest and out:
        out[-1] = TokenText(out[-1].text + visible(rest), out[-1].special)
    return out


def visible(text: str) -> str:
    """``text`` with what cannot be seen as ``⟨U+....⟩``; ``\\r\\n`` becomes ``\\n``."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))
