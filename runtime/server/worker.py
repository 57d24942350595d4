"""The thread that computes: a step of each job in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()
_LOG = logging.getLogger(__name__)


class Worker:
    """Runs jobs, which are iterators, a step of each in turn.

    One thread for all sessions: an engine uses all the threads it was given, so answers side by side would only slow
    each other down, while a step (a chunk of a prompt, or a token) in turn keeps a long prompt from starving a short
    answer. Jobs handle their own errors; others are logged.
    """

    def __init__(self) -> None:
        self._inbox: SimpleQueue[Iterator[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trimkv-worker", daemon=True)
        self._thread.start()

    def add(self, job: Iterator[Any]) -> None:
        """Takes a job, which runs to its end."""
        self._inbox.put(job)

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """What ``call`` gives, called between two steps."""
        future: Future[T] = Future()

        def job() -> Iterator[None]:
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)
            yield

        self.add(job())
        return future

    def shutdown(self) -> None:
        """Waits until all jobs have ended."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        jobs: deque[Iterator[Any]] = deque()
        ends = False
        while jobs or not ends:
            try:
                new = self._inbox.get(block=not jobs)
                ends |= new is None
                if new is not None:
                    jobs.append(new)
                continue
            except Empty:
                pass
            job = jobs.popleft()
            try:
                if next(job, _END) is not _END:
                    jobs.append(job)
            except Exception:
                _LOG.exception("a job failed")
