"""The worker: one thread, a step of each job in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from trimkv_edge.runtime.server.worker import Worker


def test_jobs_take_turns_in_one_thread() -> None:
    worker, order, threads = Worker(), list[tuple[str, int]](), set[int]()

    def job(name: str, steps: int) -> Iterator[None]:
        for step in range(steps):
            threads.add(threading.get_ident())
            order.append((name, step))
            yield

    free = threading.Event()
    worker.submit(free.wait, 20)  # until all are there
    for name, steps in (("a", 3), ("b", 1), ("c", 2)):
        worker.add(job(name, steps))
    free.set()
    worker.shutdown()
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_calls_come_between_steps_and_tell_their_errors() -> None:
    worker, reached, goes_on = Worker(), threading.Event(), threading.Event()

    def job() -> Iterator[None]:
        for _ in range(3):
            reached.set()
            assert goes_on.wait(20)
            yield

    worker.add(job())
    assert reached.wait(20)
    good, bad = worker.submit(int, "7"), worker.submit(int, "x")
    assert not good.done()
    goes_on.set()
    assert good.result(20) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result(20)
    worker.shutdown()


def test_a_job_that_fails_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    worker, seen = Worker(), list[int]()

    def fails() -> Iterator[None]:
        yield
        raise ValueError("what went wrong")

    def works() -> Iterator[None]:
        for step in range(4):
            seen.append(step)
            yield

    worker.add(fails())
    worker.add(works())
    worker.shutdown()
    assert seen == [0, 1, 2, 3]
    assert "what went wrong" in caplog.text
