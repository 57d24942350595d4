"""Which graph reads which tokens of the stream that ranges are taken from."""

from __future__ import annotations

from typing import Any

import pytest
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends import calibration
from trimkv_edge.export.backends.calibration import calibrate
from trimkv_edge.export.host_evicted import HostEvicted

CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@pytest.mark.parametrize(
    ("some", "singly"),
    [
        # Events after 32, 40, 48 and 56 tokens end a chunk, and so does the last part's begin.
        (10, [1] * 10 + [8, 8, 6, 8, 6] + [1] * 10),
        (28, [1] * 56),
        (256, [1] * 56),
    ],
)
def test_a_graph_for_few_tokens_reads_both_ends(some: int, singly: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SOME", some)
    module, read = HostEvicted(gated_model("llama-gqa")), []

    def graph(count: int) -> Any:
        def call(hidden: Any, cos: Any, sin: Any, mask: Any, past: list[Any]) -> Any:
            assert hidden.shape[1] == count
            read.append(len({tuple(row) for row in cos[0].tolist()}))  # a short chunk repeats a token
            return module(hidden, cos, sin, mask, past)

        return call

    calibrate({1: graph(1), 8: graph(8)}, module, CONFIG, random_tokens(56))
    assert read == singly + [8] * 7
