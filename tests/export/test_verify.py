"""Verification must pass for an equal engine and fail for each way in which one can differ."""

from __future__ import annotations

import numpy as np
import pytest
from factories import gated_model, random_tokens

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import CacheState, FloatArray, IntArray
from trimkv_edge.errors import VerificationError
from trimkv_edge.export.verify import MIN_EVENTS, ParityReport, check, compare, load_tolerance, stream_plan
from trimkv_edge.models.eager import EagerEngine

CONFIG = CacheConfig(budget=16, buffer=8, prefill_chunk=8)
PLAN = stream_plan(16, 8, 8)
TOLERANCE = load_tolerance("float32")


def engine(kind: type[EagerEngine] = EagerEngine, seed: int = 0) -> EagerEngine:
    return kind(gated_model("qwen3-gqa", seed=seed), CONFIG)


def report_on(artefact: EagerEngine) -> ParityReport:
    return compare(engine(), artefact, random_tokens(sum(PLAN)), PLAN, TOLERANCE.score_rel)


@pytest.mark.parametrize(("budget", "buffer", "chunk"), [(512, 128, 128), (16, 8, 8), (5, 1, 1), (64, 128, 33)])
def test_plan_meets_every_event_boundary(budget: int, buffer: int, chunk: int) -> None:
    live, events = 0, 0
    for size in stream_plan(budget, buffer, chunk):
        assert 1 <= size <= chunk
        live += size
        assert live <= budget + buffer
        if live == budget + buffer:
            live, events = budget, events + 1
    assert events >= MIN_EVENTS


def test_equal_engines_pass() -> None:
    report = report_on(engine())
    check(report, TOLERANCE, "the copy")
    assert report.tokens == sum(PLAN)
    assert report.events >= MIN_EVENTS
    assert report.survivors == report.events * 2 * 2 * 16
    assert (report.survivor_mismatches, report.undecidable, report.greedy_mismatches) == (0, 0, 0)


class KeepsTheNewest(EagerEngine):
    """Evicts by age: right logits until the first event."""

    def _evict(self, seen: int) -> None:
        self.cache.log_beta.fill_(-1.0)
        super()._evict(seen)


class IsNoisy(EagerEngine):
    """Logits off by a thousandth of their size."""

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        logits = super()._forward(ids, position, live)
        return (logits + 1e-2 * np.sin(np.arange(logits.size, dtype=np.float32))).astype(np.float32)


class ChoosesTheSecond(EagerEngine):
    """Swaps the two best logits when they are close enough to pass for noise."""

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        logits = super()._forward(ids, position, live).copy()
        second, first = np.argsort(logits)[-2:]
        logits[[first, second]] = logits[[second, first]]
        return logits


class Overflows(EagerEngine):
    """Gives NaN once, where it hides: the greedy token stays what it was."""

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        logits = super()._forward(ids, position, live).copy()
        if position == 8:
            logits = np.where(np.arange(logits.size) == logits.argmax(), np.float32(np.nan), logits)
        return logits


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Overflows, "logits differ by nan"),
        (KeepsTheNewest, r"\d+ of \d+ survivors differ"),
        (IsNoisy, "logits differ"),
        (ChoosesTheSecond, "greedy tokens differ"),
    ],
)
def test_each_fault_is_found(kind: type[EagerEngine], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check(report_on(engine(kind)), TOLERANCE, "the artefact")


def test_too_few_events_do_not_pass() -> None:
    report = compare(engine(), engine(), random_tokens(24), [8, 8, 8], TOLERANCE.score_rel)
    assert report.events == 1
    with pytest.raises(VerificationError, match="only 1 eviction events"):
        check(report, TOLERANCE, "the artefact")


class Edge(EagerEngine):
    """Before each event, brings the last entry that leaves head (0, 0) to ``gap`` of the first that stays."""

    gap = 2e-6

    def _close_gap(self) -> None:
        log_beta, positions = self.cache.log_beta[0, 0, 0], self.cache.positions[0, 0, 0]
        age = self.seen + 1 - positions
        order = (log_beta * age).argsort()
        leaves, stays = order[CONFIG.buffer - 1], order[CONFIG.buffer]
        log_beta[leaves] = log_beta[stays] * age[stays] / age[leaves] * (1 + self.gap)

    def state(self) -> CacheState:
        if self.room == 0:
            self._close_gap()
        return super().state()


class EdgeTheOtherWay(Edge):
    """The same two entries, ranked the other way round."""

    gap = -2e-6

    def _evict(self, seen: int) -> None:
        self._close_gap()
        super()._evict(seen)


def test_scores_that_float32_cannot_rank_are_counted_apart() -> None:
    def swapped(score_rel: float) -> ParityReport:
        return compare(engine(Edge), engine(EdgeTheOtherWay), random_tokens(sum(PLAN)), PLAN, score_rel)

    tolerant, strict = swapped(TOLERANCE.score_rel), swapped(1e-7)
    assert (tolerant.undecidable, tolerant.survivor_mismatches) == (tolerant.events, 0)
    assert (strict.undecidable, strict.survivor_mismatches) == (0, strict.events)
