"""The standard library's texts in this model's tokens."""

import random
from functools import lru_cache

from trimkv_edge.models.tiny.corpus import stdlib_texts
from trimkv_edge.models.tiny.data import piece
from trimkv_edge.models.tiny_vl.tokenizer import load_tokenizer


@lru_cache(maxsize=2)
def text_ids(held_out: bool = False) -> tuple[tuple[int, ...], ...]:
    """Token ids of each standard-library file."""
    return tuple(tuple(e.ids) for e in load_tokenizer().encode_batch(list(stdlib_texts(held_out))))


def random_text(rng: random.Random, length: int, held_out: bool = False) -> list[int]:
    """`length` token ids from a random place of the standard library (files joined by the end-of-text token)."""
    return piece(rng, text_ids(held_out), length, end=0)
