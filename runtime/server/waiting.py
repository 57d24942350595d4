"""Requests that wait for a session: fair among clients, and not for ever."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from trimkv_edge.errors import ConfigError, TrimKVError
from trimkv_edge.runtime.server.pool import BusyError, SlotPool
from trimkv_edge.runtime.server.slot import Slot

_LONGEST_RETRY_S = 60


class DeadlineError(TrimKVError):
    """An answer took longer than the server allows."""


class StoppedError(TrimKVError):
    """Who asked is gone."""


class Client:
    """Who waits for an answer, and whether they still do.

    Attributes:
        name: those with the same one stand in one line.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.gone = False
        self._callbacks: list[Callable[[], None]] = []

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Calls back once, at once if the client is gone already."""
        if self.gone:
            callback()
        else:
            self._callbacks.append(callback)

    def leave(self) -> None:
        """Notes that the client went away."""
        self.gone = True
        while self._callbacks:
            self._callbacks.pop()()


class _Waiter(NamedTuple):
    conversation: str | None
    earlier: str | None
    slot: asyncio.Future[Slot]


class Line:
    """Who comes next. Clients take turns, however much each of them asks; each one's requests stay in order.

    Args:
        pool: calls back from now on; used in one event loop only.
        longest: most requests that wait; 0: none does.

    Raises:
        ConfigError: ``longest`` below 0.
    """

    def __init__(self, pool: SlotPool, longest: int) -> None:
        if longest < 0:
            raise ConfigError(f"{longest} waiting requests were asked for, but it must be 0 or more")
        self._pool, self._longest = pool, longest
        self._lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    async def claim(self, client: Client, conversation: str | None, earlier: str | None, seconds: float) -> Slot:
        """A slot, perhaps after waiting; see :meth:`SlotPool.claim`.

        Raises:
            BusyError: too many wait already.
            DeadlineError: none became free within ``seconds``.
            StoppedError: the client went away.
        """
        loop = asyncio.get_running_loop()
        self._pool.on_release = lambda: _call(loop, self._serve)
        busy = f"all {len(self._pool.slots)} sessions are busy"
        if not self._lines:
            try:
                return self._pool.claim(conversation, earlier)
            except BusyError as error:
                busy = str(error)
        if len(self) >= self._longest:
            raise BusyError(
                f"{busy}, and {len(self)} requests wait, the most that may: ask again later", self._retry_s()
            )
        waiter = _Waiter(conversation, earlier, loop.create_future())
        self._lines.setdefault(client.name, deque()).append(waiter)
        client.when_gone(lambda: _fail(waiter.slot, StoppedError("the client went away")))
        self._serve()
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(waiter.slot)
        except BaseException as error:
            self._forget(client.name, waiter)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"no session became free within {seconds:.3g} s: ask again later") from None
            raise

    def _forget(self, name: str, waiter: _Waiter) -> None:
        line = self._lines.get(name, deque())
        if waiter in line:
            line.remove(waiter)
            if not line:
                del self._lines[name]
        if not waiter.slot.cancel() and waiter.slot.exception() is None:
            self._pool.release(waiter.slot.result())  # it was given at this very moment

    def _serve(self) -> None:
        """Gives idle slots away, going round the clients."""
        tried = 0
        while tried < len(self._lines):
            name, line = next(iter(self._lines.items()))
            self._lines.move_to_end(name)
            if self._give(line):
                tried = 0
            else:
                tried += 1
            if not line:
                del self._lines[name]

    def _give(self, line: deque[_Waiter]) -> bool:
        """To the first of a line who can have one."""
        for waiter in line:
            if waiter.slot.done():
                continue
            try:
                slot = self._pool.claim(waiter.conversation, waiter.earlier)
            except BusyError:
                continue
            line.remove(waiter)
            waiter.slot.set_result(slot)
            return True
        return False

    def _retry_s(self) -> int:
        """When the line may have moved on by its own length."""
        rounds = (len(self) + 1) / len(self._pool.slots)
        return max(1, min(_LONGEST_RETRY_S, math.ceil(rounds * self._pool.answer_s)))


def _fail(future: asyncio.Future[Slot], error: TrimKVError) -> None:
    if not future.done():
        future.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(callback)
