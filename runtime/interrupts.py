"""Ctrl-C may come at any moment; an eviction event is all or nothing."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Uninterrupted:
    """``with Uninterrupted():`` lets SIGINT take effect only when the block is done.

    Python raises KeyboardInterrupt right after the native call that runs when the signal comes. After an eviction that
    would be before the new length is noted, and the cache would hold entries twice. A chunk needs no such care: until
    its length is noted it was not read. Takes about 20 us. Does nothing outside the main thread (handlers run in the
    main thread only) and where SIGINT has no Python handler.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._held: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._hold)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            if self._held is not None:
                self._previous(*self._held)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = (number, frame)
