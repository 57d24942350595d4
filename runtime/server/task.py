"""One answer: made in the worker's thread, taken in the server's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from time import monotonic

from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.server.prompt import Answer, Part, Prompt
from trimkv_edge.runtime.server.slot import Slot
from trimkv_edge.runtime.server.waiting import DeadlineError, StoppedError


class Task:
    """Starts at once. The slot is free again when the answer has ended, whether or not anybody takes the parts.

    Args:
        pool: where ``slot`` was claimed.
        slot: belongs to this task from now on.
        prompt: what to answer.
        deadline: of ``time.monotonic()``.
    """

    def __init__(self, pool: SlotPool, slot: Slot, prompt: Prompt, deadline: float) -> None:
        self.answer = Answer()
        self.error: BaseException | None = None
        self._pool, self._slot, self._prompt, self._deadline = pool, slot, prompt, deadline
        self._stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Part | None] = asyncio.Queue()
        slot.worker.add(self._run())

    def stop(self) -> None:
        """Ends the work before the next chunk or token."""
        self._stopped.set()

    async def parts(self) -> AsyncIterator[Part]:
        """The answer as it comes; leaving it stops the work.

        Raises:
            DeadlineError: the time is over.
            TrimKVError: what :meth:`Slot.answer` raises.
        """
        try:
            while (part := await self._queue.get()) is not None:
                yield part
            if self.error is not None:
                raise self.error
        finally:
            self.stop()

    def _run(self) -> Iterator[None]:
        try:
            for part in self._slot.answer(self._prompt, self.answer, self._check):
                if part is not None:
                    self._send(part)
                yield
        except BaseException as error:
            self.error = error
        finally:
            # Before the end is told: who hears of it may ask again at once.
            self._pool.release(self._slot)
            self._send(None)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StoppedError("the client went away")
        if monotonic() > self._deadline:
            raise DeadlineError("the answer took longer than the server allows (--timeout): ask for fewer tokens")

    def _send(self, part: Part | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, part)
