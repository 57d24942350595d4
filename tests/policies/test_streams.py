"""Every policy over whole streams with real attention, against its oracle; what is common to all of them."""

from __future__ import annotations

import pytest
import torch
from oracle_policies import ORACLES
from policy_stream import DIM, GROUP, HEADS, LAYERS, SCALE, PolicyStream

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError
from trimkv_edge.policies import POLICIES

SHAPES = [(12, 5, 0, 0), (9, 11, 0, 0), (12, 5, 3, 2), (8, 1, 0, 0)]


def test_every_policy_has_an_oracle() -> None:
    # These have tests of their own.
    assert set(POLICIES) - set(ORACLES) == {"full", "random", "global", "layer"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", ORACLES)
def test_survivors_rows_and_attention_equal_the_oracle(policy: str, shape: tuple[int, int, int, int]) -> None:
    budget, buffer, sinks, recent = shape
    stream = PolicyStream(policy, budget, buffer, sinks=sinks, recent=recent)
    stream.run(budget + 5 * buffer + 3)
    assert stream.events == 5 + 3 // buffer


def feed(cache: StaticCache, rows: torch.Tensor, log_beta: torch.Tensor) -> None:
    """Single tokens; ``rows`` ``[steps, layers, batch, GROUP + 2, HEADS, DIM]``."""
    for row, betas in zip(rows, log_beta, strict=True):
        for layer in range(LAYERS):
            query = row[layer, :, :GROUP].transpose(1, 2).flatten(1, 2).unsqueeze(2)
            key, value = (row[layer, :, GROUP + kind].unsqueeze(2) for kind in range(2))
            cache.retain(layer, betas[layer].unsqueeze(1))
            cache.attend(layer, query, key, value, SCALE)
        cache.advance(1)
        if cache.live == cache.config.slots:
            cache.evict()


def tables(cache: StaticCache) -> list[torch.Tensor]:
    live = cache.live
    found = [cache.positions[..., :live], cache.log_beta[..., :live]]
    return [*found, torch.stack([key[:, :, :live] for key in cache.key], 1)]


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.evicts and not policy.pooled])
def test_a_batch_equals_its_streams_and_reset_forgets(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, LAYERS, 3, GROUP + 2, HEADS, DIM, generator=generator)
    log_beta = -torch.rand(40, LAYERS, 3, HEADS, generator=generator)
    config = CacheConfig(10, 4, 4, policy)
    together = StaticCache(config, LAYERS, HEADS, DIM, batch=3)
    alone = StaticCache(config, LAYERS, HEADS, DIM)
    feed(together, rows, log_beta)
    for sequence in range(3):
        alone.reset()
        feed(alone, rows[:, :, sequence : sequence + 1], log_beta[:, :, sequence : sequence + 1])
        for one, many in zip(tables(alone), tables(together), strict=True):
            assert torch.equal(one[0], many[sequence])


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.evicts and not policy.pooled])
def test_nothing_grows(policy: str) -> None:
    """Elements held after many events are those held after the first; only what the policy reads is kept."""

    def held(cache: StaticCache) -> int:
        tensors = [*cache.key, *cache.value, cache.log_beta, cache.positions]
        more = [cache.mass, *cache._queries]
        return sum(t.untyped_storage().nbytes() for t in (*tensors, *(t for t in more if t is not None)))

    config = CacheConfig(10, 4, 4, policy)
    cache = StaticCache(config, LAYERS, HEADS, DIM)
    feed(cache, torch.randn(30, LAYERS, 1, GROUP + 2, HEADS, DIM), torch.zeros(30, LAYERS, 1, HEADS))
    early = held(cache)
    feed(cache, torch.randn(80, LAYERS, 1, GROUP + 2, HEADS, DIM), torch.zeros(80, LAYERS, 1, HEADS))
    assert held(cache) == early
    assert (cache.mass is not None) == (policy == "h2o")
    assert (cache._queries[0] is not None) == (policy in ("snapkv", "r-kv", "tova"))


@pytest.mark.parametrize("policy", ORACLES)
def test_chunk_lengths_change_nothing(policy: str) -> None:
    rows = torch.randn(42, LAYERS, 1, GROUP + 2, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    log_beta = -torch.rand(42, LAYERS, 1, HEADS, generator=torch.Generator().manual_seed(4))
    config = CacheConfig(12, 6, 6, policy)
    single, chunked = (StaticCache(config, LAYERS, HEADS, DIM) for _ in range(2))
    feed(single, rows, log_beta)
    start = 0
    for size in [6, 6, 6, 2, 4, 6, 6, 6]:
        part, betas = rows[start : start + size], log_beta[start : start + size]
        for layer in range(LAYERS):
            query = part[:, layer, :, :GROUP].permute(1, 3, 2, 0, 4).flatten(1, 2)
            key, value = (part[:, layer, :, GROUP + kind].permute(1, 2, 0, 3) for kind in range(2))
            chunked.retain(layer, betas[:, layer].transpose(0, 1))
            chunked.attend(layer, query, key, value, SCALE)
        chunked.advance(size)
        start += size
        if chunked.live == config.slots:
            chunked.evict()
    assert torch.equal(single.positions[..., :12].sort().values, chunked.positions[..., :12].sort().values)


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_look_ahead_belongs_to_gates(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"lookahead is 4, but policy {policy}"):
        StaticCache(CacheConfig(8, 4, 4, policy, lookahead=4), 1, 1, 4)


def test_registry() -> None:
    exported = ["trimkv", "global", "layer", "streaming", "keydiff", "random"]
    assert set(POLICIES) == {*exported, "full", "h2o", "snapkv", "r-kv", "tova"}
    assert [name for name, policy in POLICIES.items() if policy.exports] == exported
    assert [name for name, policy in POLICIES.items() if policy.pooled] == ["global", "layer"]
    assert all(policy.name == name for name, policy in POLICIES.items())
