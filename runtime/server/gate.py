"""One computation at a time, each in its turn."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """Held as a context by a thread that computes; :meth:`pass_on` lets the others come first.

    Every engine uses all threads it was given, so answers side by side would only slow each other down, and a long
    prompt would starve a short answer. Here each gets one chunk or token in its turn. A lock would not do: which of
    several threads gets it next is not told, and often it is the one that gave it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._held = False

    def __enter__(self) -> Turns:
        with self._lock:
            if not self._held:
                self._held = True
                return self
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it holds it from now on
            else:
                self._held = False

    def pass_on(self) -> None:
        """Lets everybody who waits now have a turn, then goes on; free if nobody does."""
        if self._waiting:
            self.__exit__(None, None, None)
            self.__enter__()
