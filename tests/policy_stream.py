"""A whole stream through the static cache and through the policies' oracle, with real attention over the survivors."""

from __future__ import annotations

import math

import numpy as np
import torch
from oracle_policies import Seen, Settings, dot, ranking

from trimkv_edge.cache import StaticCache
from trimkv_edge.config import CacheConfig

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 6
SCALE = 0.9


class PolicyStream:
    """Random queries, keys and values; a key is near an earlier one now and then, as R-KV expects."""

    def __init__(
        self, policy: str, budget: int, buffer: int, *, sinks: int = 0, recent: int = 0, seed: int = 0
    ) -> None:
        chunk = min(budget, buffer)
        self.config = CacheConfig(budget, buffer, chunk, policy, sinks=sinks, recent=recent)
        self.settings = Settings(budget, buffer, sinks, recent)
        self.cache = StaticCache(self.config, LAYERS, HEADS, DIM)
        self.heads: dict[tuple[int, int], list[Seen]] = {where: [] for where in np.ndindex(LAYERS, HEADS)}
        self.rng = np.random.default_rng(0)
        self.seen = 0
        self.events = 0
        self.largest = 0.0

    def feed(self, count: int) -> None:
        """One chunk; attention outputs are compared as they are made."""
        for layer in range(LAYERS):
            query = self.rng.standard_normal((HEADS * GROUP, count, DIM))
            key, value = self.rng.standard_normal((2, HEADS, count, DIM))
            log_beta = -self.rng.exponential(0.3, (HEADS, count)).astype(np.float32)
            for head, i in np.ndindex(HEADS, count):
                held = self.heads[layer, head]
                if held and self.rng.random() < 0.4:
                    key[head, i] = 0.2 * key[head, i] + held[self.rng.integers(len(held))].key
            tensors = [torch.from_numpy(x).float().unsqueeze(0) for x in (query, key, value)]
            self.cache.retain(layer, torch.from_numpy(log_beta.T).unsqueeze(0))
            got = self.cache.attend(layer, *tensors, SCALE)[0]
            for i, head in np.ndindex(count, HEADS):
                held = self.heads[layer, head]
                rows = [tensors[kind][0, head, i].double().tolist() for kind in (1, 2)]
                held.append(Seen(self.seen + i, float(log_beta[head, i]), *rows))
                for g in range(GROUP):
                    q = tensors[0][0, head * GROUP + g, i].double().tolist()
                    want = self._attend(held, q, self.seen + i)
                    gap = np.abs(got[i, head * GROUP + g].double().numpy() - want).max()
                    self.largest = max(self.largest, float(gap))
        self.cache.advance(count)
        self.seen += count

    @staticmethod
    def _attend(held: list[Seen], query: list[float], position: int) -> np.ndarray:
        """Softmax attention of one query; every entry notes what it received."""
        weights = [math.exp(SCALE * dot(query, entry.key)) for entry in held]
        total = sum(weights)
        out = np.zeros(DIM)
        for entry, weight in zip(held, weights, strict=True):
            entry.mass += weight / total
            entry.received.setdefault(position, []).append(weight / total)
            out += weight / total * np.array(entry.value)
        return out

    def end_step(self) -> None:
        """The event, if one is due."""
        if self.cache.live < self.config.slots:
            return
        self.cache.evict()
        self.events += 1
        after = {}
        for (layer, head), held in self.heads.items():
            together = [self.heads[layer, h] for h in range(HEADS)]
            order = ranking(held, together, self.config.policy, self.seen, self.settings)
            after[layer, head] = sorted(order[self.config.buffer :], key=lambda entry: entry.position)
        self.heads = after

    def check(self) -> None:
        """Survivors, their rows, and what they received."""
        live = self.cache.live
        for (layer, head), held in self.heads.items():
            positions = self.cache.positions[0, layer, head, :live]
            order = positions.argsort()
            assert positions[order].tolist() == [entry.position for entry in held]
            rows = self.cache.key[layer][0, head, :live][order].double().numpy()
            assert np.array_equal(rows, np.array([entry.key for entry in held]).reshape(-1, DIM))
            if self.cache.mass is not None:
                mass = self.cache.mass[0, layer, head, :live][order].double().numpy()
                np.testing.assert_allclose(mass, [entry.mass for entry in held], rtol=1e-5)
        assert self.largest < 1e-5

    def run(self, total: int) -> None:
        """Chunks of random lengths, checked after every step."""
        while self.seen < total:
            most = min(self.config.prefill_chunk, self.config.slots - self.cache.live, total - self.seen)
            self.feed(int(self.rng.integers(1, most + 1)))
            self.end_step()
            self.check()
