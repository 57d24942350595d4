"""Log-probabilities against a table made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimkv_edge.runtime.server.scores import score


def test_probabilities_of_a_small_table() -> None:
    # 2, 1, 1 and 4 of 8 shares.
    logits = np.log(np.array([2, 1, 1, 4], np.float32)) + np.float32(3)
    found = score(logits, 1, 3, "abcd".__getitem__)
    assert (found.text, found.logprob) == ("b", pytest.approx(math.log(1 / 8), abs=1e-6))
    assert [name for name, _ in found.top] == ["d", "a", "b"]  # the lower id first where two are equal
    assert [math.exp(value) for _, value in found.top] == pytest.approx([4 / 8, 2 / 8, 1 / 8], abs=1e-6)
    assert score(logits, 3, 0, "abcd".__getitem__).top == ()


def test_large_logits_do_not_overflow() -> None:
    found = score(np.array([1000, 0], np.float32), 1, 1, "ab".__getitem__)
    assert (found.logprob, found.top) == (pytest.approx(-1000), (("a", 0.0),))
