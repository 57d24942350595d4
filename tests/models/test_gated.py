"""With a budget larger than the stream, logits are those of plain transformers on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import CONFIGS, LONGROPE_ORIGINAL, base_model, gated_model, random_tokens
from oracle_model import OracleModel

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import StateError
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import chunk_positions

ROOMY = CacheConfig(budget=96, buffer=32, prefill_chunk=32)


def _engine_logits(engine: EagerEngine, tokens: list[int], prefill: int) -> np.ndarray:
    for start in range(0, prefill, 32):
        logits = engine.prefill(tokens[start : min(start + 32, prefill)])
    for token in tokens[prefill:]:
        logits = engine.decode(token)
    return logits


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("case", CONFIGS)
def test_roomy_budget_equals_plain_transformers(case: str, kind: str) -> None:
    tokens = random_tokens(80)
    with torch.no_grad():
        want = base_model(case)(torch.tensor([tokens])).logits[0, -1].numpy()
    got = _engine_logits(EagerEngine(gated_model(case, kind), ROOMY), tokens, prefill=70)
    assert np.abs(want - got).max() < 1e-4


@pytest.mark.parametrize(("rope", "length"), [("short", LONGROPE_ORIGINAL - 4), ("long", LONGROPE_ORIGINAL + 20)])
def test_longrope_factor_sets_equal_transformers(rope: str, length: int) -> None:
    tokens = random_tokens(length, seed=3)
    with torch.no_grad():
        want = base_model("phi3-longrope")(torch.tensor([tokens])).logits[0, -1].numpy()
    got = _engine_logits(EagerEngine(gated_model("phi3-longrope", rope=rope), ROOMY), tokens, prefill=length - 3)
    assert np.abs(want - got).max() < 1e-4
    other = "long" if rope == "short" else "short"
    wrong = _engine_logits(EagerEngine(gated_model("phi3-longrope", rope=other), ROOMY), tokens, prefill=length - 3)
    assert np.abs(want - wrong).max() > 1e-2


def test_all_logits_equal_plain_transformers() -> None:
    tokens = torch.tensor([random_tokens(24), random_tokens(24, seed=1)])
    model = gated_model("qwen3-gqa")
    cache = StaticCache(ROOMY, 2, 2, 32, batch=2)
    with torch.no_grad():
        want = base_model("qwen3-gqa")(tokens).logits
        got = model(tokens, chunk_positions(0, 24), cache, last_only=False)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen3-gqa", "llama-gqa", "phi3-mha"])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_survivors_and_tokens_equal_the_oracle(case: str, kind: str) -> None:
    config = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
    model = gated_model(case, kind)
    engine, oracle = EagerEngine(model, config), OracleModel(model, config)
    rng = np.random.default_rng(0)
    tokens, events = random_tokens(400, seed=5), 0
    while events < 12:
        size = int(rng.integers(1, min(engine.room, 8) + 1))
        chunk = tokens[engine.seen : engine.seen + size]
        got, want = engine.prefill(chunk), oracle.read(chunk)
        assert np.abs(got - want).max() < 1e-4
        assert got.argmax() == want.argmax()
        if engine.room == 0:
            engine.evict()
            events += 1
        assert np.array_equal(np.sort(engine.survivors(), axis=-1), oracle.positions())
    kept = np.sort(engine.survivors()[..., :16], axis=-1)
    assert any((kept[0, 0] != row).any() for row in kept.reshape(-1, 16))


def test_a_failed_chunk_leaves_the_engine_as_it_was() -> None:
    engine = EagerEngine(gated_model("llama-gqa"), CacheConfig(budget=8, buffer=4, prefill_chunk=4))
    engine.prefill([5, 6, 7])
    with pytest.raises(StateError, match="1 to 4 fit"):
        engine.prefill([1] * 5)
    with pytest.raises(StateError, match="outside the vocabulary"):
        engine.prefill([99999])
    assert (engine.seen, engine.live) == (3, 3)
    again = EagerEngine(gated_model("llama-gqa"), CacheConfig(budget=8, buffer=4, prefill_chunk=4))
    again.prefill([5, 6, 7])
    np.testing.assert_array_equal(engine.decode(8), again.decode(8))
