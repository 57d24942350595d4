"""Answers that have to follow a JSON schema: which tokens may come next. Needs ``llguidance``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trimkv_edge.errors import ArtefactError, ConfigError, TrimKVError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE

# A small model that may write white space without end does.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes constraints for one artefact's tokens.

    Args:
        artefact: with a tokenizer.

    Raises:
        ArtefactError: it has none, or no token that ends an answer.
        TrimKVError: llguidance is not installed, or cannot read this tokenizer.
    """

    def __init__(self, artefact: Artefact) -> None:
        try:
            import llguidance
            import llguidance.numpy
        except ImportError as error:
            raise TrimKVError(f"JSON output needs a package ({error}): pip install 'trimkv-edge[serve]'") from error
        info = artefact.manifest.tokenizer
        if info is None or not info.eos_token_ids:
            raise ArtefactError(
                f"{artefact.folder} has no tokenizer with an end token, so it cannot be held to a schema"
            )
        self._library, self._vocab = llguidance, artefact.manifest.model.vocab_size
        text = (artefact.folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        try:
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocab, eos_token=list(info.eos_token_ids))
        except ValueError as error:
            raise TrimKVError(f"llguidance cannot read {TOKENIZER_FILE} of {artefact.folder}: {error}") from error

    def of_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """Holds an answer to a JSON schema.

        Raises:
            ConfigError: the schema is invalid, or asks for what llguidance does not enforce.
        """
        matcher = self._library.LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from error
        if problem := matcher.validate_grammar(grammar, self._tokenizer):
            raise ConfigError(f"the JSON schema cannot be used: {' '.join(problem.split())}")
        return Constraint(matcher(self._tokenizer, grammar), self._vocab)


class Constraint:
    """Where one answer stands in its grammar.

    Args:
        matcher: ``llguidance.LLMatcher`` at the start.
        vocab_size: length of masks.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab = matcher, vocab_size
        self._bits = np.zeros((1, (vocab_size + 31) // 32), np.int32)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Bool ``[vocab_size]``: tokens that may come next; at the end only those that end an answer.

        Raises:
            ConfigError: the grammar has become too complex to go on.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        """Notes the token that was chosen.

        Raises:
            ConfigError: it was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the answer cannot follow its JSON schema: {self._matcher.get_error()}")
