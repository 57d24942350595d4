"""Which words facts are made of."""

from __future__ import annotations

from trimkv_edge.evaluation.samples import WordList
from trimkv_edge.models.tiny.words import KEYS, VALUES

# Plain nouns without overlap; each is one token of the shipped model and one or two of others.
WORDS = WordList(KEYS, VALUES)
