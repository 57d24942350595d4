"""Text <-> token ids of an artefact's ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.errors import ArtefactError, ConfigError, TrimKVError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


class TextTokenizer:
    """A tokenizer file.

    Args:
        path: the ``tokenizer.json``.

    Raises:
        ArtefactError: the file is missing or damaged.
        TrimKVError: the tokenizers package is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise TrimKVError(f"text needs the tokenizers package ({error}): pip install tokenizers") from error
        if not path.is_file():
            raise ArtefactError(f"{path} is missing: export the artefact again or copy the whole folder")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ArtefactError(f"{path} cannot be read ({error}): copy or export the artefact again") from error

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        One call, whatever the length: 165k tokens take 0.6 s and 70 MB for the moment. Cutting the text first would be
        wrong for many tokenizers (GPT-2's pattern joins white space across line ends, others put a space in front).

        Raises:
            ConfigError: the text holds half a surrogate pair, so it is not Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"the text is not valid Unicode at character {error.start}: give it as UTF-8") from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; ids that the tokenizer does not know give nothing."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def shown(self, token_id: int) -> str:
        """A token as people can read it: its text, or how it is written in templates if it has none."""
        return self.decode([token_id]) or self.token(token_id)

    def token(self, token_id: int) -> str:
        """A token as it is written in templates (``<|im_end|>``); empty if the id is unknown."""
        return self._tokenizer.id_to_token(token_id) or ""
