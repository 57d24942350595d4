"""The measurement of decode speed, on an engine whose steps take a known time."""

from __future__ import annotations

import re
import time

from numpy_engine import NumpyEngine

from trimkv_edge.config import CacheConfig
from trimkv_edge.engine import FloatArray, IntArray
from trimkv_edge.export.speed import measure_speed, processor

CONFIG = CacheConfig(budget=16, buffer=8, prefill_chunk=8)


class TimedEngine(NumpyEngine):
    """5 ms a step, 40 ms an event; remembers what it read and the greedy tokens it gave."""

    threads = 3
    step_s, event_s = 0.005, 0.04

    def _forward(self, ids: IntArray, position: int, live: int) -> FloatArray:
        time.sleep(self.step_s)
        logits = super()._forward(ids, position, live)
        self.read, self.gave = getattr(self, "read", []) + ids.tolist(), int(logits.argmax())
        self.given = [*getattr(self, "given", []), self.gave]
        return logits

    def _evict(self, seen: int) -> None:
        time.sleep(self.event_s)
        super()._evict(seen)


def filled(**settings: int) -> TimedEngine:
    engine = TimedEngine(CONFIG, **settings)
    for start in range(0, 24, 8):
        engine.prefill(range(start, start + 8))
    engine.evict()
    return engine


def test_steps_and_events_are_told_apart() -> None:
    engine = filled()
    engine.read, engine.given = [], []
    speed = measure_speed(engine, steps=20)
    assert 5 <= speed["decode_ms"] < 40
    assert 40 <= speed["event_ms"] < 400
    # 22 steps with the two to warm up; events fall due before the 9th and the 17th, so 6 new entries remain.
    assert (speed["steps"], speed["entries"], speed["threads"]) == (20, 22, 3)
    assert engine.seen == 24 + 22
    assert engine.read[1:] == engine.given[:-1]  # greedy
    assert speed["device"] == processor()


def test_without_an_event() -> None:
    speed = measure_speed(filled(), steps=4)
    assert (speed["steps"], speed["event_ms"]) == (4, 0.0)


def test_slow_models_stop_at_the_time() -> None:
    started = time.perf_counter()
    speed = measure_speed(filled(), steps=10_000, seconds=0.1)
    assert time.perf_counter() - started < 2
    assert 1 <= speed["steps"] <= 20


def test_a_stream_that_is_about_to_end() -> None:
    assert measure_speed(filled(position_limit=24)) == {}
    assert measure_speed(filled(position_limit=25))["steps"] == 1
    assert measure_speed(filled(position_limit=30))["steps"] == 4


def test_an_engine_that_does_not_say_its_threads() -> None:
    assert measure_speed(NumpyEngine(CONFIG), steps=1)["threads"] == 0


def test_the_processor_has_a_name() -> None:
    assert re.fullmatch(r"\S.*, [1-9]\d* CPUs?", processor())
